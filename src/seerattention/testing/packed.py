"""What packed sequences must give: what each gives alone, whatever the others hold."""

from __future__ import annotations

import torch

from seerattention.ops.cases.score_blocks import packed
from seerattention.ops.score_blocks import score_blocks
from seerattention.rows import num_blocks


def check_packed_scores(backend: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
    """Check scores of packed sequences and their gradients against those of each one alone, to the bit.

    Raises:
        AssertionError: If one differs, or what a rectangle's shorter rows leave is read.
    """
    rows, options, q, k = packed(dtype, device)
    size_k = options["block_size"][1] // options["sub_blocks"][1]
    for keys, (_, tokens) in zip(k, rows.known, strict=True):
        keys[:, num_blocks(tokens, size_k) :] = torch.nan
    q, k = q.requires_grad_(), k.requires_grad_()
    scores = score_blocks(q, k, rows=rows, **options, backend=backend)
    assert scores.shape[2:] == rows.num_blocks(options["block_size"])
    gradient = torch.randint(-2, 3, scores.shape, device=device).to(scores.dtype)
    found_q, found_k = torch.autograd.grad(scores, (q, k), gradient)
    places = rows.places(rows.num_queries, options["block_size"][0] // options["sub_blocks"][0])
    for one, (down, across) in rows.maps(options["block_size"]):
        summaries = slice(0, num_blocks(one.rows.num_keys, size_k))
        own_q = q[:, :, places[one.index]].detach().requires_grad_()
        own_k = k[one.index, None, :, summaries].detach().requires_grad_()
        alone = score_blocks(own_q, own_k, rows=one.rows, **options, backend=backend)
        assert torch.equal(scores[:, :, down, across], alone)
        assert not scores[:, :, down, across.stop :].any()
        wanted = torch.autograd.grad(alone, (own_q, own_k), gradient[:, :, down, across])
        assert torch.equal(found_q[:, :, places[one.index]], wanted[0])
        assert torch.equal(found_k[one.index, None, :, summaries], wanted[1])
        assert not found_k[one.index, :, summaries.stop :].any()
