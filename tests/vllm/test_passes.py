"""What is looked at in a pass of a batch: nothing of one that only decodes."""

from types import SimpleNamespace

import numpy as np
import torch

from seerattention.hosts.vllm.served import Served


def looking(prompts):
    """What is served to requests with these prompts; those of 100 tokens and more are sparse."""
    served = object.__new__(Served)
    runner = SimpleNamespace(input_batch=SimpleNamespace(num_prompt_tokens=np.array(prompts)))
    served.runner = lambda: runner
    served.layer = SimpleNamespace(why_dense=lambda tokens, device: "short" if tokens < 100 else None)
    return served


def passed(edges, keys, **more):
    """vLLM's metadata, whose arrays are longer than the batch."""
    edges, keys = torch.tensor([*edges, 0]), torch.tensor([*keys, 0])
    return SimpleNamespace(
        num_reqs=len(keys) - 1, query_start_loc_cpu=edges, seq_lens_cpu_upper_bound=keys, **more
    )


def test_decoding_asks_for_no_more_than_lengths():
    # The third is padding of a graph, in the place of a request that has gone.
    assert looking([90, 300, 700]).look(passed([0, 1, 4, 4], [91, 304, 0])) is None


def test_prompts_are_told_from_what_is_decoded():
    given = passed([0, 1, 51, 60, 60], [91, 350, 9, 0], block_table_tensor=torch.zeros(4, 8))
    batch = looking([90, 300, 9, 5]).look(given)
    assert (batch.past, batch.keys) == ([90, 300, 0, 0], [91, 350, 9, 0])
    assert (batch.reading, batch.sparse) == ({2}, set())
    batch = looking([90, 301, 9, 5]).look(given)
    assert (batch.reading, batch.sparse, batch.dense_tokens) == ({1, 2}, {1}, 9)
    assert list(batch.others()) == [(slice(0, 1), slice(0, 1)), (slice(2, 4), slice(51, 60))]
