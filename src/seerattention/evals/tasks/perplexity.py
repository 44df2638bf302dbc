"""Perplexity by position: the loss of every token of windows that lie within one document each."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from transformers import PreTrainedModel

from seerattention.evals.tasks._base import Outcome, Sample, Source
from seerattention.measure.perplexity import next_token_losses
from seerattention.measure.timing import timed


@dataclass(frozen=True)
class Perplexity:
    """The task.

    The seed is the number of the window: windows do not overlap, and documents take turns.

    Attributes:
        parts: Equal parts of a window whose losses are reported one by one.

    Raises:
        ValueError: If ``parts`` is below 1.
    """

    parts: int = 8
    metric: ClassVar[Literal["share", "loss"]] = "loss"
    new_tokens: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise ValueError(f"perplexity needs parts of at least 1, got {self.parts}")

    def make(self, source: Source, length: int, seed: int) -> Sample:
        """Make a sample; see `Task.make`."""
        window = length - len(source.bos)
        if window <= self.parts:
            raise ValueError(f"perplexity needs more than {self.parts} tokens, got {length}; ask for more")
        counts = [len(document) // window for document in source.documents]
        if seed >= sum(counts):
            raise ValueError(
                f"perplexity: the text has {sum(counts)} windows of {length} tokens, window {seed + 1} was "
                "asked for; give more text, or fewer samples"
            )
        turn, left = 0, seed
        while left >= (able := sum(count > turn for count in counts)):
            turn, left = turn + 1, left - able
        document = [i for i, count in enumerate(counts) if count > turn][left]
        part = source.documents[document][turn * window : (turn + 1) * window]
        return Sample(np.concatenate([source.bos, part]).astype(np.int64))

    def run(self, model: PreTrainedModel, source: Source, sample: Sample) -> Outcome:
        """Return the mean loss, and that of each part."""
        found, seconds = timed(lambda: next_token_losses(model, sample.prompt))
        losses = found.double().cpu().numpy()
        # The loss at index i is of the token at position i + 1.
        edges = np.linspace(0, len(losses), self.parts + 1).astype(int)
        parts = [(int(a) + 1, int(b) + 1, float(losses[a:b].mean())) for a, b in itertools.pairwise(edges)]
        return Outcome("", float(losses.mean()), seconds, seconds, tuple(parts))


create = Perplexity
