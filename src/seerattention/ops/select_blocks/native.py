"""x86-64 CPUs: scores and policy in C++, a few rows at a time; ``choosing.cpp`` of ``ops/native``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seerattention.ops.native import choosing
from seerattention.ops.rules import KINDS
from seerattention.ops.score_blocks import check_pair
from seerattention.policies import Policy, Rule, rule_of
from seerattention.rows import Rows, num_blocks
from seerattention.scorer import Scorer, compares_shares, rounded
from seerattention.selection import WORD, BlockSelection


def unsupported(q: Tensor, k_blocks: Tensor, scorer: Scorer, policy: Policy, rows: Rows) -> list[str]:
    """Return the reasons why this backend cannot run."""
    reasons = choosing.unsupported(k_blocks)
    if getattr(scorer, "sub_blocks", None) is None:
        reasons.append(f"{type(scorer).__name__} does not say that its scores are products (sub_blocks)")
    if rule_of(policy, rows.num_blocks(scorer.block_size)[1], scorer.block_size[1]) is None:
        reasons.append(f"the policy {policy.name} gives no rule")
    if type(policy).always is not Policy.always:
        reasons.append(f"the policy {policy.name} always reads blocks of its own")
    return reasons


@torch.no_grad()
def run(
    q: Tensor, k_blocks: Tensor, scorer: Any, policy: Policy, rows: Rows, *, positions: Tensor
) -> BlockSelection:
    """Return the selection."""
    queries = scorer.summarise_queries(q, positions=positions, rows=rows)
    check_pair(queries, k_blocks)
    batch, heads = queries.shape[:2]
    down, columns = rows.num_blocks(scorer.block_size)
    rules = [_rule(policy, keys, scorer.block_size[1], heads) for _, keys in rows.known]
    values = torch.tensor([rule.per_head or (rule.value,) * heads for rule in rules], dtype=torch.float64)
    bits = torch.empty((batch, heads, down, num_blocks(columns, WORD)), dtype=torch.int32)
    start = choosing.choose_op if torch.compiler.is_compiling() else choosing.choose
    start(
        rounded(queries, scorer),
        rounded(k_blocks.to(queries.dtype), scorer),
        bits,
        [length for one in rows.known for length in one],
        list(scorer.block_size),
        list(scorer.sub_blocks),
        True,
        compares_shares(scorer),
        scorer.scale,
        KINDS.index(rules[0].kind),
        values,
        rules[0].row_exponent,
        [policy.sink_blocks, policy.local_blocks, policy.dense_last_rows],
    )
    return BlockSelection(bits, (batch, heads, down, columns), scorer.block_size)


def _rule(policy: Policy, keys: int, block: int, heads: int) -> Rule:
    rule = rule_of(policy, num_blocks(keys, block), block)
    assert rule is not None
    rule.check_heads(heads)
    return rule
