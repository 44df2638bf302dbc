"""The portable backends on a CUDA device: outputs, targets and memory."""

import itertools

import pytest
import torch

from seerattention.ops.block_sparse_attention import BACKENDS, block_sparse_attention
from seerattention.ops.pooled_attention import pooled_attention
from seerattention.selection import BlockSelection, causal_blocks
from seerattention.testing.budget import assert_within_budget

pytestmark = pytest.mark.gpu


def make(tokens_q, tokens_k, heads=8, kv_heads=2, dim=64, dtype=torch.bfloat16, density=0.3, size=64):
    generator = torch.Generator("cuda").manual_seed(tokens_q)

    def rand(h, t):
        return torch.randn(2, h, t, dim, generator=generator, device="cuda").to(dtype)

    q, k, v = rand(heads, tokens_q), rand(kv_heads, tokens_k), rand(kv_heads, tokens_k)
    valid = causal_blocks(tokens_q, tokens_k, (size, size), "cuda")
    mask = torch.rand(2, heads, *valid.shape, generator=generator, device="cuda") < density
    last = valid.long().cumsum(-1).argmax(-1)
    mask |= torch.nn.functional.one_hot(last, valid.shape[1]).bool()
    if tokens_q % size and tokens_q != tokens_k:
        mask |= valid
    return q, k, v, BlockSelection.from_mask(mask & valid, (size, size))


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize(
    ("tokens", "dim", "dtype"),
    [
        (1, 64, torch.bfloat16),
        (63, 64, torch.float16),
        (64, 128, torch.bfloat16),
        (65, 64, torch.float32),
        (1000, 64, torch.bfloat16),
        (1000, 128, torch.float16),
    ],
)
def test_output_within_the_error_budget(backend, tokens, dim, dtype):
    q, k, v, selection = make(tokens, tokens, dim=dim, dtype=dtype)
    gold = block_sparse_attention(*(x.double() for x in (q, k, v)), selection, backend="reference")
    same = block_sparse_attention(q, k, v, selection, backend="reference")
    assert_within_budget(block_sparse_attention(q, k, v, selection, backend=backend), gold, same)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_unselected_keys_and_values_are_never_read(backend):
    q, k, v, selection = make(128, 1024, heads=2)
    before = block_sparse_attention(q, k, v, selection, backend=backend)
    unread = ~selection.to_mask().any(2)
    tokens = unread.repeat_interleave(64, -1)[..., None]
    assert bool(tokens.any()), "every block is read; nothing would be tested"
    poisoned = [x.masked_fill(tokens, float("nan")) for x in (k, v)]
    assert torch.equal(before, block_sparse_attention(q, *poisoned, selection, backend=backend))


@pytest.mark.parametrize(
    ("tokens", "block", "dtype"),
    list(itertools.product([65, 1000], [(64, 64), (32, 128)], [torch.bfloat16, torch.float32])),
)
def test_pooled_attention_within_the_error_budget(tokens, block, dtype):
    q, k, v, _ = make(tokens, tokens, dtype=dtype)
    gold_out, gold = pooled_attention(q.double(), k.double(), v.double(), block, backend="reference")
    same_out, same = pooled_attention(q, k, v, block, backend="reference")
    out, target = pooled_attention(q, k, v, block)
    assert_within_budget(out, gold_out, same_out)
    assert_within_budget(target, gold.double(), same)


def test_pooled_attention_needs_bounded_memory_at_32k_tokens():
    from seerattention.ops.pooled_attention import chunked

    q, k, v = (torch.randn(1, h, 32768, 64, device="cuda", dtype=torch.bfloat16) for h in (6, 2, 2))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, target = pooled_attention(q, k, v, (64, 64))
    extra = torch.cuda.max_memory_allocated() - before - out.nbytes - target.nbytes
    # Scores and their softmax, each within the budget, the mask, and fp32 copies of q, k and v.
    copies = 2 * (2 * q.nbytes + k.nbytes + v.nbytes) + target.nbytes
    assert extra <= 3 * chunked.WORK_BYTES["cuda"] + copies
