"""Choose KV blocks for few query tokens, each alone: a step of decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from seerattention.ops.dispatch import choose, load_backends, outside_autocast
from seerattention.policies import Policy, check_decodes
from seerattention.rows import num_blocks
from seerattention.scorer import Scorer
from seerattention.selection import BlockSelection

BACKENDS = load_backends(__name__, __path__)

#: What ``auto`` tries, in order; ``reference`` waits for a GPU to learn the lengths.
ORDER = tuple(name for name in ("triton", "composed", "reference") if name in BACKENDS)


@outside_autocast
@torch.no_grad()
def select_decode_blocks(
    q: Tensor,
    k_blocks: Tensor,
    scorer: Scorer,
    policy: Policy,
    *,
    lengths: Tensor,
    num_keys: int,
    kv_heads: int,
    backend: str = "auto",
) -> BlockSelection:
    """Choose the KV blocks that each of a sequence's last tokens reads, one selection per KV head.

    A block takes part once all of its tokens are at or before the query. The query's own block is always
    read; unfinished, it has no summary and no share in the softmax. Where a scorer has a score per query
    head, a KV head takes the largest share of the softmax among the heads of its group. Lengths are read on
    the device, so that a captured graph stays right while they change in place; `reference`, which scorers
    whose scores are no products need, waits for them.

    Args:
        q: ``[B, Hq, Tq, D]``, the last tokens of their sequences, before the rotary embedding, or after it
            if ``scorer.after_rope``.
        k_blocks: ``[B, H, S, E]``, the summaries that ``scorer.compress`` makes, of a cache of ``num_keys``
            tokens or more. What lies past a sequence's finished blocks may hold anything.
        scorer: Ranks the blocks; its blocks are ``(1, b)``, as of `Scorer.per_token`.
        policy: Decides how many of them to take; a number of blocks includes those always read.
        lengths: int32 ``[B]``, keys of every sequence, those of the queries included. Nobody checks them.
        num_keys: Tokens that the cache can hold.
        kv_heads: KV heads of the attention, ``Hk``.
        backend: ``auto``, or a name of ``BACKENDS``, which then runs or raises.

    Returns:
        A selection of shape ``(B, Hk, Tq, ceil(num_keys / b))``.

    Raises:
        TypeError: If the lengths are not int32.
        ValueError: If shapes or the scorer do not fit, the policy is not one for decoding, or the backend is
            unknown.
        NotImplementedError: If the backend cannot run this, with its reasons.

    Source: SeerAttention-R, section 3 (arXiv 2506.08889).
    """
    _check(q, k_blocks, scorer, lengths, num_keys, kv_heads)
    check_decodes(policy, scorer.block_size[1])
    args = {"q": q, "k_blocks": k_blocks, "scorer": scorer, "policy": policy, "lengths": lengths}
    args |= {"num_keys": num_keys, "kv_heads": kv_heads}
    return choose(BACKENDS, ORDER, backend, **args).run(**args)


def _check(
    q: Tensor, k_blocks: Tensor, scorer: Scorer, lengths: Tensor, num_keys: int, kv_heads: int
) -> None:
    if scorer.block_size[0] != 1:
        raise ValueError(
            f"decoding scores every token alone, blocks of (1, b), got {scorer.block_size}; use "
            "scorer.per_token()"
        )
    if lengths.dtype != torch.int32:
        raise TypeError(f"lengths must be int32, got {lengths.dtype}")
    if lengths.shape != q.shape[:1] or lengths.device != q.device:
        raise ValueError(
            f"lengths must be [{q.shape[0]}] on {q.device}, got {list(lengths.shape)} on {lengths.device}"
        )
    if kv_heads < 1 or q.shape[1] % kv_heads:
        raise ValueError(f"query heads must be a multiple of KV heads, got {q.shape[1]} and {kv_heads}")
    need = num_blocks(num_keys, scorer.tokens_per_summary)
    if k_blocks.dim() != 4 or k_blocks.shape[0] != q.shape[0] or k_blocks.shape[2] < need:
        raise ValueError(
            f"k_blocks must be [{q.shape[0]}, H, {need}, E] for a cache of {num_keys} tokens, got "
            f"{list(k_blocks.shape)}"
        )
