"""Numbers hidden in a text in the words the bundled teacher knows: `seerattention.measure.needle`.

All questions of a document are answered in one pass, by the most likely next token at every digit given
the ones before: what greedy decoding would say where it is right so far. Documents are those of the demo, by
seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
from transformers import PreTrainedModel

from seerattention.evals.tasks._base import Outcome, Sample, Source
from seerattention.measure.needle import NeedleDocument, NeedleTask
from seerattention.measure.retrieval import predictions
from seerattention.measure.timing import timed


@dataclass(frozen=True, kw_only=True)
class NeedleSample(Sample):
    """A document, whose answers stand in the prompt behind their questions."""

    document: NeedleDocument


@dataclass(frozen=True)
class Needle:
    """The task.

    Attributes:
        needles: Numbers hidden and asked for.
        digits: Digits of each.
    """

    needles: int = 8
    digits: int = 5
    metric: ClassVar[Literal["share", "loss"]] = "share"
    new_tokens: ClassVar[int] = 0

    def make(self, source: Source, length: int, seed: int) -> NeedleSample:
        """Make a sample; see `Task.make`."""
        document = _maker(source, self.needles, self.digits).make(length, seed)
        return NeedleSample(
            prompt=document.tokens,
            expected=document.values,
            places=tuple(start for start, _ in document.places),
            document=document,
        )

    def run(self, model: PreTrainedModel, source: Source, sample: Sample) -> Outcome:
        """Predict every digit and count the answers right in all of them."""
        assert isinstance(sample, NeedleSample)
        document = sample.document
        found, seconds = timed(lambda: predictions(model, document))
        ends = np.cumsum([stop - start for start, stop in document.answers])[:-1]
        said = [str(source.tokenizer.decode(part.tolist())) for part in np.split(found, ends)]
        score = document.correct(found) / len(sample.expected)
        return Outcome(" ".join(said), score, seconds, seconds)


@lru_cache(maxsize=4)
def _maker(source: Source, needles: int, digits: int) -> NeedleTask:
    return NeedleTask(source.tokenizer, source.haystack, needles, digits)


create = Needle
