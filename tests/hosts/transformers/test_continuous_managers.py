"""Managers of continuous batching: what they serve meanwhile, what is refused, and what detaching leaves."""

import pytest
from transformers import CompileConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager, PagedAttentionCache

from seerattention.hosts import transformers as host
from seerattention.hosts.transformers.intercept import runtime_of
from tests.hosts.transformers.batches import (
    GREEDY,
    NEW_TOKENS,
    POLICY,
    ROWS,
    alone,
    assert_as_alone,
    attached,
    manager_for,
    options,
    prompts_of,
    results,
    serve,
    serving,
    started,
)


@pytest.fixture
def manager(tiny):
    """A model with gates, and a manager that serves it."""
    model = tiny.make()
    host.attach(model, tiny.gates_for(model), POLICY, min_tokens=0)
    with started(model) as made:
        yield model, made


def test_one_batch_after_another(tiny):
    model, seen = attached(tiny)
    with started(model) as made:
        for lengths in ((100, 30), (77,), (48, 64, 5)):
            prompts = prompts_of(tiny, *lengths)
            expected = [alone(model, prompt) for prompt in prompts]
            rows = seen.taken()
            names = made.add_requests(prompts)
            outs = results(made, len(prompts))
            assert [list(outs[name].generated_tokens) for name in names] == expected
            assert seen.taken() == rows


def test_a_request_that_is_cancelled(tiny, manager):
    model, made = manager
    prompts = prompts_of(tiny, 100, 77, 40)
    expected = [alone(model, prompt) for prompt in prompts]
    gone = made.add_request(prompts_of(tiny, 90)[0], max_new_tokens=400, streaming=True)
    assert made.get_result(timeout=60).request_id == gone
    names = made.add_requests(prompts)
    made.cancel_request(gone)
    outs = results(made, 3)
    assert [list(outs[name].generated_tokens) for name in names] == expected
    assert gone not in outs


def test_other_requests_meanwhile(tiny, manager):
    """A model that is served can be called too, and is dense where it is told to be."""
    model, made = manager
    prompts = prompts_of(tiny, 100, 77, 40)
    expected = [alone(model, prompt) for prompt in prompts]
    with host.dense(model):
        plain = [alone(model, prompt) for prompt in prompts]
    names = made.add_requests(prompts * 4)
    assert [alone(model, prompt) for prompt in prompts] == expected
    with host.dense(model):
        assert [alone(model, prompt) for prompt in prompts] == plain
    outs = results(made, 12)
    assert [list(outs[name].generated_tokens) for name in names] == expected * 4


def test_a_policy_that_changes_meanwhile(tiny, manager):
    model, made = manager
    (prompt,) = prompts_of(tiny, 100)
    host.set_policy(model, "top_k:1.0")
    expected = alone(model, prompt)
    made.add_request(prompt)
    (out,) = results(made, 1).values()
    assert list(out.generated_tokens) == expected
    host.set_policy(model, POLICY)
    assert alone(model, prompt) != expected, "the policy makes no difference"


def test_pages_from_before_a_policy_changed_are_not_shared(tiny):
    model, texts = tiny.make(), []
    host.attach(model, tiny.gates_for(model), ROWS, min_tokens=0)
    (prompt,) = prompts_of(tiny, 160)
    with started(model, allow_block_sharing=True) as made:
        for policy in (ROWS, "top_k:1.0"):
            if policy != ROWS:
                host.set_policy(model, policy)
            texts.append(alone(model, prompt))
            # The second one finds the pages of the first.
            for _ in range(2):
                made.add_request(prompt)
                (out,) = results(made, 1).values()
                assert list(out.generated_tokens) == texts[-1]
    assert texts[0] != texts[1], "the policy makes no difference"


def test_a_policy_for_decoding_meanwhile(tiny):
    model = tiny.make()
    host.attach(model, tiny.gates_for(model, phase="both"), prefill=POLICY, decode="dense")
    with started(model) as made:
        host.set_policy(model, decode="token_budget:32")
        made.add_request(prompts_of(tiny, 30)[0])
        out = made.output_router.output_queue.get(timeout=60)
    assert out.error.startswith("continuous batching decodes densely")


def test_sixty_requests(tiny, manager):
    model, made = manager
    lengths = [1 + 37 * i % 190 for i in range(60)]
    prompts = prompts_of(tiny, *lengths)
    names = made.add_requests(prompts)
    outs = results(made, 60)
    assert {len(out.generated_tokens) for out in outs.values()} == {NEW_TOKENS}
    for i in range(0, 60, 7):
        assert list(outs[names[i]].generated_tokens) == alone(model, prompts[i])


def test_nobody_detaches_while_a_manager_runs(tiny, manager):
    model, made = manager
    made.add_request(prompts_of(tiny, 20)[0])
    results(made, 1)
    refused = pytest.raises(ValueError, match="a manager of continuous batching runs; let it end, or stop")
    with refused:
        host.detach(model)
    with refused:
        host.attach(model, tiny.gates_for(model), POLICY)
    made.stop(block=True)
    host.detach(model)


def test_detaching_leaves_everything_as_it_was(tiny):
    model = tiny.make()
    before = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    implementation = model.config._attn_implementation
    prompts = prompts_of(tiny, 100, 77)
    plain = serve(model, prompts)
    for _ in range(2):
        host.attach(model, tiny.gates_for(model), POLICY, min_tokens=0)
        host.attach(model, tiny.gates_for(model), POLICY, min_tokens=0)
        assert serve(model, prompts, kept=True) == [alone(model, prompt) for prompt in prompts] != plain
        assert model.config._attn_implementation == implementation
        host.detach(model)
        assert "_cached_continuous_batching_manager" not in vars(model)
    assert {name: value for name, value in vars(model).items() if not name.startswith("_")} == before
    assert serve(model, prompts) == plain


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_whatever_attends_without_gates(tiny, monkeypatch, implementation):
    """Nor is it another one while a manager makes its cache: other requests are dense meanwhile."""
    model, seen = attached(tiny)
    model.set_attn_implementation(implementation)
    own, meanwhile = PagedAttentionCache.__init__, []

    def make(cache, *args, **kwargs):
        meanwhile.append(model.config._attn_implementation)
        own(cache, *args, **kwargs)

    monkeypatch.setattr(PagedAttentionCache, "__init__", make)
    assert_as_alone(model, seen, prompts_of(tiny, 100, 23))
    assert [*meanwhile, model.config._attn_implementation] == [implementation] * 2


def test_no_mask_is_made(tiny, manager):
    """It would be as long as a batch and as wide as the cache."""
    _, made = manager
    made.add_request(prompts_of(tiny, 40)[0])
    results(made, 1)
    assert made.batch_processor.inputs_and_outputs.attention_mask is None


def test_dense_is_the_models_own(tiny):
    model, _ = attached(tiny)
    prompts = prompts_of(tiny, 100, 77)
    with host.dense(model):
        plain = serve(model, prompts)
    host.detach(model)
    assert plain == [alone(model, prompt) for prompt in prompts]


@pytest.mark.parametrize("begun", [False, True])
def test_a_manager_from_before_attaching_stays_dense(tiny, begun):
    """A pass that had begun, too, whose decoder was not hooked when it was called."""
    model = tiny.make()
    prompts = prompts_of(tiny, 100, 77)
    plain = [alone(model, prompt) for prompt in prompts]
    with started(model) as made:
        names = made.add_requests(prompts)
        host.attach(model, tiny.gates_for(model), POLICY, min_tokens=0)
        if begun:
            runtime_of(model).hooks[0].remove()
        names += made.add_requests(prompts)
        outs = results(made, 4)
    assert [list(outs[name].generated_tokens) for name in names] == plain * 2
    assert "sparse" not in host.usage(model)


def test_a_manager_of_what_was_detached_says_so(tiny):
    model, _ = attached(tiny)
    made = manager_for(model)
    host.detach(model)
    with serving(made):
        made.add_request([3, 4, 5])
        out = made.output_router.output_queue.get(timeout=60)
    assert out.error == "what this manager serves was detached; make a new one"


def test_a_kept_manager_that_serves_otherwise(tiny):
    model = tiny.make()
    prompts = prompts_of(tiny, 30)
    refused = pytest.raises(ValueError, match="destroy_cached_continuous_batching_manager")
    serve(model, prompts, kept=True)
    host.attach(model, tiny.gates_for(model), POLICY, min_tokens=0)
    with refused:
        serve(model, prompts)
    model.destroy_cached_continuous_batching_manager()
    serve(model, prompts, kept=True)
    with host.dense(model), refused:
        serve(model, prompts)


@pytest.mark.parametrize(
    "asked",
    [
        {"use_cuda_graph": True},
        {"use_cuda_graph": (False, True)},
        {"varlen_compile_config": CompileConfig()},
        {"decode_compile_config": CompileConfig()},
        {"default_compile_level": 1},
        {"use_async_batching": True},
    ],
    ids=str,
)
def test_options_that_need_graphs(tiny, asked):
    model, _ = attached(tiny)
    with pytest.raises(NotImplementedError, match="leave these options out, or do it inside dense"):
        serve(model, prompts_of(tiny, 30), **asked)
    assert model.config._attn_implementation == "sdpa"


def test_what_else_is_refused(tiny):
    model, _ = attached(tiny)
    prompts = prompts_of(tiny, 30)
    with (
        host.intercept(model, lambda call: call.dense()),
        pytest.raises(ValueError, match="leave intercept"),
    ):
        serve(model, prompts)
    host.attach(model, tiny.gates_for(model, phase="both"), POLICY, decode="token_budget:32")
    with pytest.raises(NotImplementedError, match='set_policy\\(model, decode="dense"\\) first'):
        serve(model, prompts)
    host.set_policy(model, decode="dense")
    serve(model, prompts)


def test_a_version_that_is_not_known(tiny, monkeypatch):
    model, _ = attached(tiny)
    monkeypatch.delattr(ContinuousBatchingManager, "_generation_step")
    with pytest.raises(RuntimeError, match=r"has no _generation_step with .*versions 5\.15 to 5\.24"):
        serve(model, prompts_of(tiny, 30))


def test_keys_that_cannot_be_rotated_back(tiny):
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model, _ = attached(tiny, rope_parameters=dynamic)
    with pytest.raises(NotImplementedError, match=r"inside dense\(model\): RoPE is of type dynamic"):
        serve(model, prompts_of(tiny, 30))


def test_managers_are_made_by_the_model(tiny):
    """A manager made around the model's method serves it as it is without gates."""
    model, _ = attached(tiny)
    (prompt,) = prompts_of(tiny, 50)
    with host.dense(model):
        plain = alone(model, prompt)
    made = ContinuousBatchingManager(model, GenerationConfig(**GREEDY), options())
    with serving(made):
        made.add_request(prompt)
        (out,) = results(made, 1).values()
    assert list(out.generated_tokens) == plain
