"""KV eviction against the rules written out token by token, and what a model makes of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from seerattention.engine.call import AttentionCall, Given
from seerattention.hosts.transformers import intercept
from seerattention.measure import bundled
from seerattention.measure.decoding import continued
from seerattention.measure.evicting import H2O, Evicting, SnapKV
from seerattention.policies import TokenBudget
from seerattention.rows import Rows

B, HQ, HK, D, BLOCK = 2, 4, 2, 16, 16
PROMPT, TOTAL = 101, 330
POLICY = TokenBudget(96, sink_blocks=1, local_blocks=2)


def call_of(q: Tensor, k: Tensor, v: Tensor, first: int, last: int, layer: int = 0) -> AttentionCall:
    own = slice(first, last)
    given = Given(q[:, :, own], k[:, :, :last], v[:, :, :last], q[:, :, own], k[:, :, own])
    return AttentionCall(layer, given, Rows.last(last - first, last), D**-0.5)


def decoded(handler: Evicting, tensors: tuple[Tensor, Tensor, Tensor], piece: int) -> tuple[Tensor, Tensor]:
    """The outputs of all tokens after the prompt, and the blocks that they read, bool [B, Hk, T, N]."""
    masks: list[Tensor] = []

    def observe(layer: int, call: AttentionCall, selection: object) -> None:
        mask = selection.to_mask()
        masks.append(torch.nn.functional.pad(mask, (0, -(-TOTAL // BLOCK) - mask.shape[3])))

    handler.observe = observe
    handler(call_of(*tensors, 0, PROMPT))
    outs = [
        handler(call_of(*tensors, first, min(first + piece, TOTAL))) for first in range(PROMPT, TOTAL, piece)
    ]
    return torch.cat(outs, 2), torch.cat(masks, 2)


@pytest.fixture(scope="module", params=range(3))
def tensors(request) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(request.param)
    q, k = torch.randn(B, HQ, TOTAL, D), torch.randn(B, HK, TOTAL, D)
    # Some blocks get more attention than others, and every few tokens others do.
    taste = 3 * torch.randn(B, HQ, TOTAL // 40 + 1, 4).repeat_interleave(40, 2)[:, :, :TOTAL]
    appeal = 3 * torch.randn(B, HK, TOTAL // BLOCK + 1, 4).repeat_interleave(BLOCK, 2)[:, :, :TOTAL]
    q[..., :4] += taste
    k[..., :4] += appeal
    return q, k, torch.randn(B, HK, TOTAL, D)


def shares_by_token(q: Tensor, k: Tensor, position: int, blocks: set[int]) -> list[float]:
    """A query's attention per block over the tokens of some blocks, [N] of plain numbers."""
    keys = [j for j in range(position + 1) if j // BLOCK in blocks]
    weights = torch.softmax(torch.stack([q @ k[j] for j in keys]).double() * D**-0.5, 0)
    found = [0.0] * -(-TOTAL // BLOCK)
    for j, weight in zip(keys, weights.tolist(), strict=True):
        found[j // BLOCK] += weight
    return found


def simulated(tensors: tuple[Tensor, Tensor, Tensor], rule: str, b: int, head: int) -> list[set[int]]:
    """The blocks that each token after the prompt reads, of one sequence and KV head."""
    q, k, _ = tensors
    heads = range(head * HQ // HK, (head + 1) * HQ // HK)
    count = -(-TOTAL // BLOCK)
    mass = {h: [0.0] * count for h in heads}

    def add(position: int, blocks: set[int]) -> None:
        for h in heads:
            new = shares_by_token(q[b, h, position], k[b, head], position, blocks)
            mass[h] = [old + one for old, one in zip(mass[h], new, strict=True)]

    for position in range(0 if rule == "h2o" else PROMPT - 64, PROMPT):
        add(position, set(range(count)))
    there, read, found = set(range(-(-PROMPT // BLOCK))), set(), []
    for position in range(PROMPT, TOTAL):
        own = position // BLOCK
        if position == PROMPT or position % BLOCK == 0:
            always = {0, own - 1, own}
            total = {h: sum(mass[h][j] for j in there) for h in heads}
            worth = {j: max(mass[h][j] / total[h] for h in heads) for j in there - always}
            best = sorted(worth, key=lambda j: -worth[j])[: 96 // BLOCK - len(always)]
            read = always | set(best)
            there = set(read)
        if rule == "h2o":
            add(position, read)
        found.append(read)
    return found


@pytest.mark.parametrize(("rule", "kind"), [("snapkv", SnapKV), ("h2o", H2O)])
def test_what_is_kept_is_what_the_rule_says_written_out_token_by_token(tensors, rule, kind) -> None:
    _, read = decoded(kind(POLICY, block=BLOCK), tensors, 7)
    for b in range(B):
        for head in range(HK):
            rows = [set(row.nonzero()[:, 0].tolist()) for row in read[b, head]]
            assert rows == simulated(tensors, rule, b, head)
    # A rule that keeps whatever is first, or what is last, would not be told apart otherwise.
    assert len({tuple(row.tolist()) for row in read[:, :, -1].flatten(0, 1)}) > 1


def test_decoded_tokens_add_the_attention_that_they_pay_to_what_they_read(tensors) -> None:
    q, k, _ = tensors
    read = torch.rand(B, HK, 7) < 0.5
    # Where the rows lie, which they always read.
    read[..., 6] = True
    found = H2O(POLICY, block=BLOCK).decoded_mass(
        call_of(*tensors, PROMPT - 9, PROMPT + 3), slice(5, 10), read
    )
    for b in range(B):
        for h in range(HQ):
            blocks = set(read[b, h // (HQ // HK)].nonzero()[:, 0].tolist())
            rows = [
                shares_by_token(q[b, h, position], k[b, h // (HQ // HK)], position, blocks)[:7]
                for position in range(PROMPT - 4, PROMPT + 1)
            ]
            torch.testing.assert_close(found[b, h], torch.tensor(rows).sum(0))


@pytest.mark.parametrize("kind", [SnapKV, H2O])
def test_what_was_evicted_never_returns_and_every_token_reads_its_budget(tensors, kind) -> None:
    out, read = decoded(kind(POLICY, block=BLOCK), tensors, 15)
    own = torch.arange(PROMPT, TOTAL) // BLOCK
    new = torch.nn.functional.one_hot(own, read.shape[3]).bool()
    assert not (read[:, :, 1:] & ~read[:, :, :-1] & ~new[1:]).any()
    assert (read.sum(-1) == 96 // BLOCK).all()
    assert (read & new).any(-1).all()
    assert (read[:, :, 0] & ~read[:, :, -1]).any()
    single, alone = decoded(kind(POLICY, block=BLOCK), tensors, 1)
    assert torch.equal(read, alone)
    torch.testing.assert_close(out, single)


@pytest.mark.parametrize("kind", [SnapKV, H2O])
def test_a_budget_for_everything_is_dense(tensors, kind) -> None:
    out, read = decoded(kind(TokenBudget(512), block=BLOCK), tensors, 15)
    q, k, v = tensors
    whole = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, whole[:, :, PROMPT:])
    assert read[..., -1, :].all()


def test_layers_and_prompts_have_kept_blocks_of_their_own(tensors) -> None:
    handler = H2O(POLICY, block=BLOCK)
    _, before = decoded(handler, tensors, 15)
    others = tuple(x.flip(1) for x in tensors)
    handler(call_of(*others, 0, PROMPT, layer=1))
    handler(call_of(*others, PROMPT, PROMPT + 9, layer=1))
    _, again = decoded(handler, tensors, 15)
    assert torch.equal(before, again)


def test_what_cannot_be_evicted_from_is_refused(tensors) -> None:
    with pytest.raises(ValueError, match="less than a block of 16 tokens"):
        H2O(TokenBudget(8), block=BLOCK)
    handler = SnapKV(POLICY, block=BLOCK)
    with pytest.raises(ValueError, match="9 tokens came after 101 others; give the whole prompt at once"):
        handler(call_of(*tensors, PROMPT, PROMPT + 9))
    handler(call_of(*tensors, 0, PROMPT))
    with pytest.raises(ValueError, match="later tokens fewer than 16 at a time"):
        handler(call_of(*tensors, PROMPT, PROMPT + 16))
    model, _ = bundled.load_teacher()
    ids = torch.tensor([[1, 2, 3], [1, 2, 3]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with (
        intercept(model, SnapKV(TokenBudget(256))),
        pytest.raises(NotImplementedError, match="without padding"),
    ):
        model(ids, attention_mask=mask)


def test_a_model_decodes_so() -> None:
    model, tokenizer = bundled.load_teacher()
    text = bundled.text_tokens(tokenizer)[1]
    windows = np.stack([text[:480], text[480:960]])
    dense = continued(model, windows, 384)
    for budget, kind in ((4096, SnapKV), (4096, H2O), (192, SnapKV), (192, H2O)):
        losses = []
        for piece in (8, 63):
            with intercept(model, kind(TokenBudget(budget, sink_blocks=1))):
                losses.append(continued(model, windows, 384, step=piece).losses)
        torch.testing.assert_close(*losses, rtol=0, atol=1e-4)
        same = torch.allclose(losses[0], dense.losses, rtol=0, atol=1e-4)
        assert same == (budget == 4096)
