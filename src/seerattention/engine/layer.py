"""What `attach` puts in place of a layer's attention: decide when, select, attend."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from seerattention.attention import seer_attention
from seerattention.crossover import Crossover, crossover
from seerattention.engine.call import AttentionCall, Unrotate
from seerattention.engine.summaries import Growing, summarised
from seerattention.engine.when import why_dense
from seerattention.ops.block_sparse_attention import BACKENDS
from seerattention.ops.dispatch import check_backend
from seerattention.policies import Policy
from seerattention.rows import Rows, num_blocks
from seerattention.scorer import Scorer
from seerattention.selection import BlockSelection

#: Called after every sparse layer with its inputs and the blocks that were read; one call at a time.
Observer = Callable[[int, AttentionCall, BlockSelection], None]

# Requests of several threads count, and are observed, one after the other.
_ONE_AT_A_TIME = threading.RLock()


def _crossovers() -> dict[str, Crossover]:
    # Looked up here, not in a call, where `torch.compile` would trace the reading of a file.
    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return {kind: crossover(kind) for kind in kinds}


@dataclass(frozen=True)
class SparseLayer:
    """Computes attention layers over the blocks that scorers and a policy choose.

    Attributes:
        scorers: The scorer of every layer.
        policy: How many blocks to read.
        unrotate: Rotates the model's cached keys back.
        backend: A backend of ``block_sparse_attention``.
        min_tokens: Sequences shorter than this are dense, all others sparse; by default the table of
            measured crossovers says which, by length and, where the policy knows it, by density.
        observe: Called after every sparse layer.
        usage: How often a layer was sparse, or dense and why.
        short: Of every policy that could not read what it asks for, why, in the latest such prompt.
        crossovers: The table's entry for every kind of device at hand.
    """

    scorers: Mapping[int, Scorer]
    policy: Policy
    unrotate: Unrotate
    backend: str = "auto"
    min_tokens: int | None = None
    observe: Observer | None = None
    usage: Counter[str] = field(default_factory=Counter)
    short: dict[str, str] = field(default_factory=dict)
    crossovers: Mapping[str, Crossover] = field(default_factory=_crossovers)

    def __post_init__(self) -> None:
        check_backend(BACKENDS, self.backend)
        if not (self.min_tokens is None or (isinstance(self.min_tokens, int) and self.min_tokens >= 0)):
            raise ValueError(f"min_tokens must be a whole number >= 0, got {self.min_tokens!r}")

    def __call__(self, call: AttentionCall) -> Tensor:
        """Return the output of one layer, of ``call.q``'s shape."""
        scorer = self.scorers[call.layer]
        known = self.crossovers.get(call.given.q.device.type)
        why = why_dense(call, scorer, self.policy, self.min_tokens, known)
        if scorer.after_rope:
            read = None
        else:
            summaries = call.summaries or Growing()
            missing = summaries.follow(call, scorer, self.unrotate)
            why = tuple(reason or none for reason, none in zip(why, missing, strict=True))
            read = summaries.read
        rows: dict[str | None, list[int]] = {}
        for row, (new, _) in enumerate(call.lengths):
            if new:
                rows.setdefault(why[row], []).append(row)
        if len(rows) == 1:
            return self._compute(call, scorer, next(iter(rows)), read)
        outs = {}
        for reason, some in rows.items():
            part = call.part(some)
            read_some = None if read is None else partial(_rows, read, some)
            out = self._compute(part, scorer, reason, read_some)
            outs |= zip(some, out.split([new for new, _ in part.lengths], 2), strict=True)
        return torch.cat([outs[row] for row in sorted(outs)], 2)

    def _compute(
        self, call: AttentionCall, scorer: Scorer, why: str | None, read: Callable[[], Tensor] | None
    ) -> Tensor:
        """Compute a call densely if there is a reason, else over the blocks that are chosen."""
        with _ONE_AT_A_TIME:
            self.usage[why or "sparse"] += 1
        if why is not None:
            return call.dense()
        self._note_short(call, scorer.block_size[1])
        out, selection = seer_attention(
            call.q,
            call.k,
            call.v,
            scorer,
            self._policy_of(call, scorer),
            q_scored=call.q if scorer.after_rope else call.q_nope,
            k_blocks=_compressed(call, scorer) if read is None else read(),
            rows=call.rows,
            positions=call.positions,
            scale=call.scale,
            softcap=call.softcap,
            sinks=call.sinks,
            backend=self.backend,
        )
        if self.observe is not None:
            with _ONE_AT_A_TIME:
                self.observe(call.layer, call, selection)
        return out

    def _note_short(self, call: AttentionCall, block: int) -> None:
        """Remember that a prompt is too short for the density asked for, see `Policy.short_of`."""
        for new, total in set(call.lengths):
            tokens = call.prompt_tokens or (total if new == total else 0)
            if tokens and (why := self.policy.short_of(num_blocks(tokens, block), block)):
                self.short[str(self.policy)] = why

    def _policy_of(self, call: AttentionCall, scorer: Scorer) -> Policy:
        """Return the policy, for a piece of a prompt of known length as it is for the whole prompt."""
        policy, block, tokens = self.policy.at(call.layer), scorer.block_size[1], call.prompt_tokens
        if tokens is None:
            return policy
        last = call.rows.num_keys == tokens
        return policy.for_prompt(num_blocks(tokens, block), block, last_piece=last)


def _rows(read: Callable[[], Tensor], some: list[int]) -> Tensor:
    return read()[some]


def _compressed(call: AttentionCall, scorer: Scorer) -> Tensor:
    """Summarise all keys after RoPE."""
    if not call.rows.is_packed:
        return scorer.compress(call.k, positions=torch.arange(call.k.shape[2], device=call.k.device))
    rows = Rows.packed([(keys, keys) for _, keys in call.rows.known], call.k.device)
    return summarised(scorer, call.k, rows, rows.positions())
