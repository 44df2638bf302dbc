"""Common words: which ten words appear most often in a long numbered list.

Source: RULER (arXiv 2404.06654), section 3.3 and its published code: ten words 30 times among others 3
times, below 4,096 tokens 6 times and once; one worked example; 120 tokens for the answer. The words are those
of the given text, not of a word list. A prompt falls short of its length by less than one more word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from seerattention.evals.tasks._base import Generated, Prompt, Sample, Source, rng_of

_BEFORE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the "
    "ones that appear most often.\n"
)
_QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
_PREFIX = " Answer: The top 10 words that appear most often in the list are:"

#: Common words, and the length from which lists are long.
COMMON, LONG = 10, 4096


@dataclass(frozen=True)
class CommonWords(Generated):
    """The task; it has no options."""

    new_tokens: ClassVar[int] = 120

    def make(self, source: Source, length: int, seed: int) -> Sample:
        """Make a sample; see `Task.make`."""
        rng = rng_of("common_words", length, seed)
        often, seldom = (30, 3) if length >= LONG else (6, 1)
        words = [source.words[i] for i in rng.permutation(len(source.words))]
        before = self._example(words, rng, length) + _BEFORE
        # The example's words come again no more often than others.
        common, rest = words[-COMMON:], words[:-COMMON]
        prompt = Prompt("common_words", source, length, self.new_tokens, before, _QUESTION, _PREFIX)
        most = often * COMMON + seldom * len(rest)
        numbers = np.cumsum([len(source.encode(f" {i}.")) for i in range(1, most + 1)])
        fixed = often * sum(len(source.encode(" " + word)) for word in common)
        sizes = fixed + seldom * np.cumsum([0] + [len(source.encode(" " + word)) for word in rest])
        counts = COMMON * often + seldom * np.arange(len(rest) + 1)
        totals = sizes + numbers[counts - 1]
        prompt.check(prompt.room, int(totals[min(COMMON, len(rest))]))
        fitting = int(np.searchsorted(totals, prompt.room, side="right")) - 1
        if fitting == len(rest):
            raise ValueError(
                f"common_words: the text has {len(source.words)} distinct words of 4 to 10 small letters, "
                f"too few for {length} tokens; give more text"
            )
        listed = _shuffled(common * often + rest[:fitting] * seldom, rng)
        items = (text for i, word in enumerate(listed, 1) for text in (f" {i}.", f" {word}"))
        return prompt.sample(np.concatenate([source.encode(text) for text in items]), common)

    def _example(self, words: list[str], rng: np.random.Generator, length: int) -> str:
        count, often, seldom = (40, 10, 3) if length >= LONG else (20, 3, 1)
        common, rest = words[:COMMON], words[COMMON:count]
        listed = _shuffled(common * often + rest * seldom, rng)
        context = "".join(f" {i}. {word}" for i, word in enumerate(listed, 1))
        answer = "".join(f" {i}. {word}" for i, word in enumerate(common, 1))
        return f"{_BEFORE}{context}{_QUESTION}{_PREFIX}{answer}\n\n"


def _shuffled(words: list[str], rng: np.random.Generator) -> list[str]:
    return [words[i] for i in rng.permutation(len(words))]


create = CommonWords
