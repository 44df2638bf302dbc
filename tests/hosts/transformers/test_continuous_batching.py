"""Continuous batching of an attached model: requests choose what they would alone."""

import functools

import pytest
import torch
from transformers import DynamicCache
from transformers import __version__ as host_version
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
from transformers.generation.continuous_batching.requests import RequestState

from seerattention import baselines
from seerattention.hosts import transformers as host
from seerattention.hosts.transformers.attach import prompt_of
from seerattention.measure.bundled import load_teacher, load_teacher_gates, text_tokens
from tests.hosts.transformers.batches import (
    GREEDY,
    NEW_TOKENS,
    POLICY,
    ROWS,
    Chosen,
    alone,
    assert_as_alone,
    attached,
    manager_for,
    prompts_of,
    results,
    serve,
    serving,
    started,
)


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


def test_one_request_waits_at_most(tiny):
    """Who waits has pages, and those that come after are not to take them all."""
    model, _ = attached(tiny)
    made = manager_for(model)
    own, waiting = made._generation_step, []

    def step():
        batch = made.batch_processor.inputs_and_outputs.requests_in_batch
        waiting.append([one.query_length for one in batch].count(0))
        own()

    made._generation_step = step
    prompts = prompts_of(tiny, *range(60, 90))
    names = made.add_requests(prompts)
    with serving(made):
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
    with started(model, prompts, num_blocks=15, safety_margin=0.0, **changes) as made:
        outs = results(made, 3)
    assert [list(outs[f"req_{i}"].generated_tokens) for i in range(3)] == expected
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
