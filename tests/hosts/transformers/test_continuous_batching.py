"""A manager of continuous batching serves an attached model: requests choose what they would alone."""

import functools
from collections import defaultdict
from contextlib import contextmanager

import pytest
import torch
from transformers import CompileConfig, ContinuousBatchingConfig, DynamicCache, GenerationConfig
from transformers import __version__ as host_version
from transformers.generation.continuous_batching import ContinuousBatchingManager, PagedAttentionCache
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
from transformers.generation.continuous_batching.requests import RequestState

from seerattention import baselines
from seerattention.hosts import transformers as host
from seerattention.hosts.transformers.attach import prompt_of
from seerattention.hosts.transformers.continuous import parts
from seerattention.measure.bundled import load_teacher, load_teacher_gates, text_tokens

NEW_TOKENS = 4
POLICY = "top_k:0.3,sink_blocks=1"
# Every row for itself, whatever the prompt's length.
ROWS = "token_budget:48,sink_blocks=1"
PAGE = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"
GREEDY = {"max_new_tokens": NEW_TOKENS, "eos_token_id": -1, "do_sample": False}


def options(page=16, **changes):
    """A cache of some 8,000 tokens in all, and batches of 256 unless it says otherwise."""
    settings = {PAGE: page, "num_blocks": 8192 // page, "max_batch_tokens": 256, "allow_block_sharing": False}
    return ContinuousBatchingConfig(**{**settings, **changes})


def serve(model, prompts, *, kept=False, **changes):
    """The tokens that a manager of its own gives to each of some prompts, served together."""
    outs = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(**GREEDY),
        continuous_batching_config=options(**changes),
        persistent_manager=kept,
        progress_bar=False,
    )
    assert [out.error for out in outs.values()] == [None] * len(prompts)
    return [list(out.generated_tokens) for out in outs.values()]


def alone(model, prompt):
    """What `generate` gives to a prompt."""
    ids = torch.tensor([prompt])
    return model.generate(ids, **{**GREEDY, "eos_token_id": None})[0, len(prompt) :].tolist()


class Chosen:
    """The blocks that every row read, by layer and by the prompt's length, which tells prompts apart."""

    def __init__(self):
        self.rows = defaultdict(dict)

    def __call__(self, layer, call, selection):
        ((new, keys),) = call.lengths
        assert (keys - new) % selection.block_size[0] == 0
        first = (keys - new) // selection.block_size[0]
        rows = self.rows[layer, call.prompt_tokens or keys]
        for row, mask in enumerate(selection.to_mask()[0].unbind(1), first):
            read = mask[:, : row + 1].tolist()
            assert rows.setdefault(row, read) == read, "a row that was computed again reads other blocks"

    def taken(self):
        """All so far, once."""
        rows, self.rows = dict(self.rows), defaultdict(dict)
        return rows


def attached(tiny, policy=POLICY, **settings):
    """A tiny model with gates of blocks of 16, and what watches it."""
    model, seen = tiny.make(**settings), Chosen()
    host.attach(model, tiny.gates_for(model), policy, min_tokens=0, observe=seen)
    return model, seen


def prompts_of(tiny, *lengths):
    return [tiny.tokens(1, length, seed=length)[0].tolist() for length in lengths]


def assert_as_alone(model, seen, prompts, **changes):
    """Served together, prompts get the tokens and read the blocks that they do one by one."""
    expected = [alone(model, prompt) for prompt in prompts]
    rows = seen.taken()
    assert serve(model, prompts, **changes) == expected
    assert seen.taken() == rows
    layers = {layer for layer, _ in rows}
    assert rows.keys() == {(layer, len(prompt)) for layer in layers for prompt in prompts}


@functools.cache
def teacher():
    """The bundled model, its gates and some prompts out of a book."""
    model, tokenizer = load_teacher()
    text = text_tokens(tokenizer)[1]
    begins = ((5000, 1500), (20000, 777), (40000, 130))
    prompts = [text[begin : begin + length].tolist() for begin, length in begins]
    return model.float(), load_teacher_gates(), prompts


@pytest.fixture
def bundled():
    model, gates, prompts = teacher()
    yield model, gates, prompts
    if host.attached(model):
        host.detach(model)


def test_everything_read_is_plain_generation(bundled):
    model, gates, prompts = bundled
    plain = [alone(model, prompt) for prompt in prompts]
    host.attach(model, gates, "top_k:1.0", min_tokens=0)
    assert serve(model, prompts, page=256, max_batch_tokens=512) == plain


@pytest.mark.parametrize("batch", [4096, 300], ids=["whole", "pieces"])
def test_the_bundled_gates_choose_as_alone(bundled, batch):
    model, gates, prompts = bundled
    plain = [alone(model, prompt) for prompt in prompts]
    seen = Chosen()
    host.attach(model, gates, "top_k:0.1,sink_blocks=1", min_tokens=0, observe=seen)
    assert_as_alone(model, seen, prompts, page=256, max_batch_tokens=batch)
    assert serve(model, prompts, page=256, max_batch_tokens=batch) != plain, (
        "sparse or dense makes no difference"
    )


@pytest.mark.parametrize("policy", [POLICY, ROWS, "top_k:0.3,dense_last_rows=2", "threshold:0.2"])
@pytest.mark.parametrize("batch", [256, 50, 17], ids=["whole", "pieces", "small pieces"])
def test_requests_choose_as_alone(tiny, policy, batch):
    model, seen = attached(tiny, policy)
    assert_as_alone(model, seen, prompts_of(tiny, 100, 77, 23), max_batch_tokens=batch)
    assert set(host.usage(model)) == {"sparse", "dense: decoding step"}


@pytest.mark.parametrize("scheduler", ["fifo", "prefill_first"])
def test_pieces_end_where_blocks_do(tiny, scheduler):
    """A batch holds what others decode, so what is left for a prompt is not whole blocks."""
    model, seen = attached(tiny)
    prompts = prompts_of(tiny, 200, 150, 99, 61, 40, 18)
    assert_as_alone(model, seen, prompts, max_batch_tokens=50, scheduler_type=scheduler)


def test_a_prompt_waits_for_others_that_decode(tiny, monkeypatch):
    """Of batches of 24 tokens too few are left to complete its next block."""
    monkeypatch.setitem(GREEDY, "max_new_tokens", 12)
    model, seen = attached(tiny)
    assert_as_alone(model, seen, prompts_of(tiny, *range(3, 13), 100), max_batch_tokens=24)


def test_one_request_waits_at_most(tiny, manager):
    """Who waits has pages, and those that come after are not to take them all."""
    model, made = manager
    own, waiting = made._generation_step, []

    def step():
        batch = made.batch_processor.inputs_and_outputs.requests_in_batch
        waiting.append([one.query_length for one in batch].count(0))
        own()

    made._generation_step = step
    prompts = prompts_of(tiny, *range(60, 90))
    names = made.add_requests(prompts)
    outs = results(made, len(prompts))
    assert list(outs[names[-1]].generated_tokens) == alone(model, prompts[-1])
    assert set(waiting) == {0, 1}


def test_lengths_around_a_block(tiny):
    model, seen = attached(tiny)
    prompts = prompts_of(tiny, 1, 2, 15, 16, 17, 32, 33)
    assert_as_alone(model, seen, prompts)
    assert_as_alone(model, seen, prompts, max_batch_tokens=18)


def test_every_family(tiny, kind):
    model = tiny.make(kind)
    seen = Chosen()
    host.attach(model, tiny.gates_for(model), POLICY, min_tokens=0, observe=seen)
    windows = "sliding_attention" in (getattr(model.config, "layer_types", None) or ())
    if windows and host_version.startswith("5.15."):
        with pytest.raises(NotImplementedError, match=r"take 5\.16 or newer, and this is 5\.15"):
            serve(model, prompts_of(tiny, 100))
        return
    assert_as_alone(model, seen, prompts_of(tiny, 100, 77, 23), max_batch_tokens=50)


def test_a_baseline(tiny):
    """It reads keys as they are cached."""
    model, seen = tiny.make(), Chosen()
    quest = baselines.create("quest", block_size=(tiny.block, tiny.block))
    host.attach(model, quest, POLICY, min_tokens=0, observe=seen)
    assert_as_alone(model, seen, prompts_of(tiny, 100, 77, 23), max_batch_tokens=50)


def test_a_prompt_too_short_to_be_sparse_is_dense_in_pieces_too(tiny):
    model = tiny.make()
    prompts = prompts_of(tiny, 100, 77)
    plain = alone(model, prompts[1])
    host.attach(model, tiny.gates_for(model), POLICY, min_tokens=90)
    expected = [alone(model, prompt) for prompt in prompts]
    assert expected[1] == plain
    assert serve(model, prompts, max_batch_tokens=40) == expected
    assert set(host.usage(model)) == {"sparse", "dense: fewer than 90 tokens", "dense: decoding step"}


def in_pieces(model, prompt, cuts, known, cache=None):
    """The tokens of a prompt given in pieces on one cache; ``known``: as prompts of which length."""
    cache, ids = cache or DynamicCache(config=model.config), torch.tensor([prompt])
    with torch.no_grad():
        begins = [int(cache.get_seq_length()), *cuts]
        for begin, end, tokens in zip(begins, [*cuts, len(prompt)], known, strict=True):
            with prompt_of(model, tokens):
                logits = model(ids[:, begin:end], **host.cache_argument(model, cache)).logits
        tokens = []
        for _ in range(NEW_TOKENS):
            tokens.append(int(logits[0, -1].argmax()))
            logits = model(torch.tensor([tokens[-1:]]), **host.cache_argument(model, cache)).logits
    return tokens


def test_a_batch_smaller_than_a_block_cuts_blocks(tiny):
    """Of a cut block the first part chooses by the tokens it has, and the rest is dense."""
    model, seen = tiny.make(), []

    def observe(layer, call, selection):
        seen.append((layer, *call.lengths, selection.to_mask().tolist()))

    host.attach(model, tiny.gates_for(model), POLICY, min_tokens=0, observe=observe)
    (prompt,) = prompts_of(tiny, 60)
    expected = in_pieces(model, prompt, [10, 16, 26, 32, 42, 48, 58], [60] * 8)
    rows = seen.copy()
    seen.clear()
    assert serve(model, [prompt], max_batch_tokens=10) == [expected]
    assert seen == rows
    assert [lengths for layer, lengths, _ in rows if layer == 0] == [(10, 10), (10, 26), (10, 42), (10, 58)]


@pytest.mark.parametrize(
    ("past", "new", "prompt", "expected"),
    [
        (0, 100, 100, [(0, 100)]),
        (32, 68, 100, [(32, 100)]),
        (30, 70, 100, [(30, 32), (32, 100)]),
        (30, 1, 100, [(30, 31)]),
        (100, 1, 100, [(100, 101)]),
        (96, 24, 100, [(96, 100), (100, 120)]),
        (90, 30, 100, [(90, 96), (96, 100), (100, 120)]),
        (40, 0, 100, []),
    ],
)
def test_parts(past, new, prompt, expected):
    assert parts(past, new, prompt, 16) == expected


def test_a_shared_prefix(tiny):
    """What every row reads does not depend on the prompt, so pages of another one hold the same."""
    model, seen = attached(tiny, ROWS)
    prefix = prompts_of(tiny, 70)[0]
    prompts = [prefix + more for more in prompts_of(tiny, 30, 57, 5)]
    expected = [alone(model, prompt) for prompt in prompts]
    rows = seen.taken()
    # One after the other, so that pages are filled when the next one comes.
    got = [serve(model, [prompt], kept=True, allow_block_sharing=True) for prompt in prompts]
    assert [one for (one,) in got] == expected
    taken = seen.taken()
    assert {len(taken[layer, len(prompts[0])]) for layer in (0, 1)} == {7}
    for layer in (0, 1):
        for prompt in prompts[1:]:
            ours = taken[layer, len(prompt)]
            assert min(ours) == 4, "no page was shared"
            assert ours == {row: x for row, x in rows[layer, len(prompt)].items() if row >= 4}
    model.destroy_cached_continuous_batching_manager()


def test_a_shared_prefix_was_chosen_for_the_prompt_that_wrote_it(tiny):
    model, seen = attached(tiny, "top_k:0.4")
    prefix = prompts_of(tiny, 64)[0]
    first, second = (prefix + more for more in prompts_of(tiny, 9, 90))
    in_pieces(model, first, [64], [len(first)] * 2)
    expected = in_pieces(model, second, [64], [len(first), len(second)])
    rows = seen.taken()
    serve(model, [first], kept=True, allow_block_sharing=True)
    assert serve(model, [second], kept=True, allow_block_sharing=True) == [expected]
    taken = seen.taken()
    for layer in (0, 1):
        assert min(taken[layer, len(second)]) == 4
        assert taken[layer, len(second)] == rows[layer, len(second)]
    assert alone(model, second) != expected, "the budget makes no difference"
    model.destroy_cached_continuous_batching_manager()


def test_pages_that_blocks_do_not_divide(tiny):
    """The block in which shared pages end was begun by another prompt; the rest of it is dense."""
    model, seen = attached(tiny, ROWS)
    prefix = prompts_of(tiny, 75)[0]
    first, second = (prefix + more for more in prompts_of(tiny, 20, 90))
    cache = DynamicCache(config=model.config)
    in_pieces(model, first, [], [len(first)], cache)
    cache.crop(72 - int(cache.get_seq_length()))
    seen.taken()
    expected = in_pieces(model, second, [80], [len(second)] * 2, cache)
    rows = seen.taken()
    serve(model, [first], page=24, kept=True, allow_block_sharing=True)
    seen.taken()
    assert serve(model, [second], page=24, kept=True, allow_block_sharing=True) == [expected]
    assert seen.taken() == rows
    assert min(rows[0, len(second)]) == 5
    model.destroy_cached_continuous_batching_manager()


def crowded(tiny, monkeypatch, watched, **changes):
    """Serve requests with pages for 240 of their 330 tokens; return what a watched method gave each time."""
    model, _ = attached(tiny)
    prompts = prompts_of(tiny, 90, 70, 50)
    monkeypatch.setitem(GREEDY, "max_new_tokens", 40)
    expected = [alone(model, prompt) for prompt in prompts]
    kind, name = watched
    own, gave = getattr(kind, name), []

    def watch(*args):
        gave.append(own(*args))
        return gave[-1]

    monkeypatch.setattr(kind, name, watch)
    assert serve(model, prompts, num_blocks=15, safety_margin=0.0, **changes) == expected
    return gave


def test_a_request_that_begins_again_goes_on_as_it_was(tiny, monkeypatch):
    """What it had decoded when it lost its pages stays decoded, and is no part of its prompt."""
    again = crowded(tiny, monkeypatch, (RequestState, "create_equivalent_initial_request"))
    assert any(len(state.initial_tokens) not in (90, 70, 50) for state in again)


def test_a_request_whose_pages_were_kept_elsewhere(tiny, monkeypatch):
    own = torch.empty
    # There is no pinned memory without a GPU.
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **kind: own(*size, **kind))
    gone = crowded(tiny, monkeypatch, (OffloadingManager, "_offload_to_cpu"), cpu_offload_space=0.01)
    assert any(gone), "no request was offloaded"


@contextmanager
def started(model):
    """A manager that serves a model."""
    made = model.init_continuous_batching(
        generation_config=GenerationConfig(**GREEDY), continuous_batching_config=options()
    )
    made.start()
    yield made
    made.stop(block=True)


@pytest.fixture
def manager(tiny):
    """A model with gates, and a manager that serves it."""
    model = tiny.make()
    host.attach(model, tiny.gates_for(model), POLICY, min_tokens=0)
    with started(model) as made:
        yield model, made


def results(made, count):
    """So many results, by request."""
    found = {}
    while len(found) < count:
        out = made.get_result(timeout=60)
        assert out is not None, "a request got no answer"
        if out.is_finished():
            found[out.request_id] = out
    return found


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


def test_a_manager_from_before_attaching_stays_dense(tiny):
    model = tiny.make()
    prompts = prompts_of(tiny, 100, 77)
    plain = [alone(model, prompt) for prompt in prompts]
    with started(model) as made:
        names = made.add_requests(prompts)
        host.attach(model, tiny.gates_for(model), POLICY, min_tokens=0)
        names += made.add_requests(prompts)
        outs = results(made, 4)
    assert [list(outs[name].generated_tokens) for name in names] == plain * 2
    assert "sparse" not in host.usage(model)


def test_a_manager_of_what_was_detached_says_so(tiny):
    model, _ = attached(tiny)
    made = model.init_continuous_batching(
        generation_config=GenerationConfig(**GREEDY), continuous_batching_config=options()
    )
    host.detach(model)
    made.start()
    made.add_request([3, 4, 5])
    made._generation_thread.join(60)
    out = made.output_router.output_queue.get(timeout=60)
    assert out.error == "what this manager serves was detached; make a new one"
    made.stop(block=True)


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
    made.start()
    made.add_request(prompt)
    (out,) = results(made, 1).values()
    made.stop(block=True)
    assert list(out.generated_tokens) == plain
