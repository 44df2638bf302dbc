"""Frequent words: the three most frequent of made-up words whose frequencies follow a power law.

Source: RULER (arXiv 2404.06654), section 3.3 and its published code: words of six letters, the k-th most
frequent ``k^-alpha / zeta(alpha)`` of them, the first replaced by dots as noise, a vocabulary of a fiftieth
of the length, 50 tokens for the answer. More dots fill the prompt to its length.
"""

from __future__ import annotations

import string
from bisect import bisect_right
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from seerattention.evals.tasks._base import Generated, Prompt, Sample, Source, rng_of

_BEFORE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words."
)
_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
    "frequently appeared words in the above coded text?"
)
_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"

#: What stands for the most frequent word, and words at which the first ranks are told apart.
_DOTS, _LEAST = " ...", 64


@dataclass(frozen=True)
class FrequentWords(Generated):
    """The task.

    Attributes:
        alpha: Exponent of the frequencies, above 1.

    Raises:
        ValueError: If ``alpha`` is not above 1.
    """

    alpha: float = 2.0
    new_tokens: ClassVar[int] = 50

    def __post_init__(self) -> None:
        if not 1 < self.alpha <= 4:
            raise ValueError(f"frequent_words needs alpha above 1 and at most 4, got {self.alpha}")

    def make(self, source: Source, length: int, seed: int) -> Sample:
        """Make a sample; see `Task.make`."""
        rng = rng_of("frequent_words", length, seed)
        words: list[str] = []
        while len(words) < max(8, length // 50):
            word = "".join(string.ascii_lowercase[i] for i in rng.integers(0, 26, 6))
            if word not in words:
                words.append(word)
        pieces = [source.encode(text) for text in (_DOTS, *(" " + word for word in words[1:]))]
        sizes = np.array([len(piece) for piece in pieces])
        prompt = Prompt("frequent_words", source, length, self.new_tokens, _BEFORE, _QUESTION, _PREFIX)

        def tokens(total: int) -> int:
            return int(self._counts(total, len(words)) @ sizes)

        prompt.check(room := prompt.room, tokens(_LEAST))
        # The last that fits.
        most = bisect_right(range(room + 1), room, lo=_LEAST, key=tokens) - 1
        counts = self._counts(most, len(words))
        counts[0] += (room - int(counts @ sizes)) // sizes[0]
        order = rng.permutation(np.repeat(np.arange(len(words)), counts))
        return prompt.sample(np.concatenate([pieces[i] for i in order]), words[1:4])

    def _counts(self, total: int, kinds: int) -> np.ndarray:
        """How often each of the words appears among about ``total``, most frequent first."""
        zeta = float(torch.special.zeta(torch.tensor(self.alpha, dtype=torch.float64), torch.tensor(1.0)))
        return (total * np.arange(1, kinds + 1) ** -self.alpha / zeta).astype(np.int64)


create = FrequentWords
