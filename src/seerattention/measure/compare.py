"""Dense beside sparse: attach, read text and answer questions, detach, and say what was read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from statistics import median
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from seerattention.hosts.transformers import Gates, attach, detach
from seerattention.measure.needle import NeedleDocument
from seerattention.measure.observe import Watch
from seerattention.measure.perplexity import hidden_states, token_losses
from seerattention.measure.retrieval import retrieval
from seerattention.measure.timing import timed
from seerattention.policies import Policy, TopK, parse
from seerattention.rows import num_blocks
from seerattention.scorer import Scorer


@dataclass(frozen=True)
class Row:
    """What one way of attending does on some text.

    Attributes:
        method: What the row is called.
        policy: What is read, as text; empty if dense.
        tokens: Of the longest text.
        density: Fraction of the causally valid blocks that was read, as measured; 1 if dense.
        perplexity: Over all windows; None without any.
        needles: Share of the documents' answers that were right in every digit; None without documents.
        recall: Share of the attention mass in the blocks read; None if no rows were sampled.
        prefill_s: Median seconds of a window's way through the decoder; None without windows.
        short: Where the text is too short for the density asked for, in a sentence; None where it is not.
        losses: Of every window, each token's cross-entropy given the ones before it, fp64 ``[T - 1]``.
    """

    method: str
    policy: str
    tokens: int
    density: float
    perplexity: float | None = None
    needles: float | None = None
    recall: float | None = None
    prefill_s: float | None = None
    short: str | None = None
    losses: tuple[np.ndarray, ...] = field(default=(), repr=False, compare=False)

    def values(self) -> dict[str, Any]:
        """Return what was measured, but for the losses, as plain JSON types."""
        names = [f.name for f in fields(self) if f.name not in ("short", "losses")]
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}


@contextmanager
def attached(
    model: PreTrainedModel,
    scorer: Gates | Scorer | None,
    policy: Policy | str | None = None,
    *,
    recall_rows: int = 0,
) -> Iterator[Watch]:
    """Let a scorer choose the blocks of every prefill, however short, and yield what watches it.

    Args:
        model: The base model, nothing attached. It is left as it was, whatever happens.
        scorer: Gates, or one scorer for every layer; None leaves attention dense.
        policy: How many blocks to read; default the one saved with the gates.
        recall_rows: Query tokens per layer and call whose recall is measured; they cost time.
    """
    watch = Watch(recall_rows)
    if scorer is None:
        yield watch
        return
    attach(model, scorer, policy, min_tokens=0, observe=watch)
    try:
        yield watch
    finally:
        detach(model)


def short_of(scorer: Gates | Scorer, policy: Policy | str | None, tokens: int) -> str | None:
    """Say that a text is too short for the density asked for, see `Policy.short_of`; None if it is not."""
    gates = scorer if isinstance(scorer, Gates) else None
    if policy is None and gates is not None:
        policy = gates.policy
    if not isinstance(policy, Policy):
        policy = parse(str(policy), gates and gates.calibration)
    block = scorer.config.block_size if isinstance(scorer, Gates) else scorer.block_size[1]
    return policy.short_of(num_blocks(tokens, block), block)


def distinct(densities: Sequence[float], tokens: int, block: int) -> list[TopK]:
    """Return ``top_k`` with the first block at densities; of those that read the same of a text, the nearest.

    Args:
        densities: Those asked for.
        tokens: Of the text.
        block: Tokens per block.
    """
    nearest: dict[float, TopK] = {}
    for policy in (TopK(density, sink_blocks=1) for density in densities):
        read = policy.expected_density(num_blocks(tokens, block), block) or 0.0
        others = (policy, nearest.get(read, policy))
        nearest[read] = min(others, key=lambda p: abs(p.density - read))
    return list(nearest.values())


def measured(
    model: PreTrainedModel,
    scorer: Gates | Scorer | None,
    policy: Policy | str | None = None,
    *,
    method: str = "",
    windows: Sequence[np.ndarray] = (),
    documents: Sequence[NeedleDocument] = (),
    recall_rows: int = 0,
    step: Callable[[], None] = lambda: None,
) -> Row:
    """Measure one way of attending.

    Args:
        model: The base model in evaluation mode, nothing attached. It is left as it was.
        scorer: Gates, or one scorer for every layer; None measures dense attention.
        policy: How many blocks to read; default the one saved with the gates.
        method: What the row is called; default ``dense`` or ``sparse``.
        windows: Texts, int ``[T]`` each, whose perplexity and prefill time are measured.
        documents: Needle documents to be answered.
        recall_rows: Query tokens per layer and call whose recall is measured. Looking at them takes time
            that counts in ``prefill_s``.
        step: Called after every window and document.

    Returns:
        One row. Its density and recall are over windows and documents together.

    Raises:
        ValueError: If there are neither windows nor documents, a window has fewer than two tokens, or the
            scorer does not fit the model.
    """
    if not (len(windows) or len(documents)):
        raise ValueError("give windows of text, needle documents or both; there is nothing to measure on")
    losses, seconds, needles = [], [], None
    with attached(model, scorer, policy, recall_rows=recall_rows) as watch:
        for text in windows:
            hidden, took = timed(lambda text=text: hidden_states(model, text))
            losses.append(token_losses(model, hidden, text).double().cpu().numpy())
            seconds.append(took)
            step()
        if len(documents):
            needles = retrieval(model, documents, step)
    if policy is None and isinstance(scorer, Gates):
        policy = scorer.policy
    tokens = max([len(text) for text in windows] + [len(d.tokens) for d in documents])
    return Row(
        method=method or ("dense" if scorer is None else "sparse"),
        policy="" if scorer is None else str(policy),
        tokens=tokens,
        density=watch.density,
        perplexity=math.exp(np.concatenate(losses).mean()) if losses else None,
        needles=needles,
        recall=watch.recall if recall_rows else None,
        prefill_s=median(seconds) if seconds else None,
        short=None if scorer is None else short_of(scorer, policy, tokens),
        losses=tuple(losses),
    )
