"""What tests of continuous batching share: prompts served together and alone, and what every row reads."""

from collections import defaultdict
from contextlib import contextmanager

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from seerattention.hosts import transformers as host

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


def manager_for(model, **changes):
    """A manager that is yet to start."""
    return model.init_continuous_batching(
        generation_config=GenerationConfig(**GREEDY), continuous_batching_config=options(**changes)
    )


@contextmanager
def serving(made):
    """Let a manager serve; its thread would outlive the tests."""
    made.start()
    try:
        yield
    finally:
        made.stop(block=True)


@contextmanager
def started(model, prompts=(), **changes):
    """A manager that serves a model, some prompts first."""
    made = manager_for(model, **changes)
    made.add_requests(list(prompts))
    with serving(made):
        yield made


def results(made, count):
    """So many results, by request."""
    found = {}
    while len(found) < count:
        out = made.get_result(timeout=60)
        assert out is not None, "a request got no answer"
        assert out.error is None
        if out.is_finished():
            found[out.request_id] = out
    return found


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
