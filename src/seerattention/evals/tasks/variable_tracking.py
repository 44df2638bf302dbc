"""Variable tracking: which variables hold a value, through a chain of assignments in a long text.

Source: RULER (arXiv 2404.06654), section 3.2 and its published code, with one chain of four hops, one worked
example before the question, and 30 tokens for the answer. As there, further chains are distractors.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from seerattention.evals.tasks._base import Generated, Prompt, Sample, Source, rng_of
from seerattention.evals.tasks._niah import NOISE, repeated
from seerattention.measure.needle import insert

_BEFORE = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
_QUESTION = "\nQuestion: Find all variables that are assigned the value {value} in the text above."
_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are "
    "assigned the value {value}, they are: "
)

#: Noise sentences of the worked example.
_EXAMPLE_SENTENCES = 30


@dataclass(frozen=True)
class VariableTracking(Generated):
    """The task.

    Attributes:
        chains: Chains of assignments; the first one is asked for.
        hops: Assignments of a chain after its first.

    Raises:
        ValueError: If an option is out of range.
    """

    chains: int = 1
    hops: int = 4
    new_tokens: ClassVar[int] = 30

    def __post_init__(self) -> None:
        if self.chains < 1 or self.hops < 1:
            raise ValueError(
                f"variable_tracking needs chains and hops of at least 1, got {self.chains} and {self.hops}"
            )

    def make(self, source: Source, length: int, seed: int) -> Sample:
        """Make a sample; see `Task.make`."""
        rng = rng_of("variable_tracking", length, seed)
        before = self._example(rng) + _BEFORE
        chains, value = self._chains(rng, letters=5)
        texts = before, *self._asked(value)
        prompt = Prompt("variable_tracking", source, length, self.new_tokens, *texts)
        pieces = [source.encode(" " + text) for chain in chains for text in _statements(chain)]
        room = prompt.room - sum(map(len, pieces))
        longest = max(len(source.encode(sentence)) for sentence in NOISE)
        prompt.check(room, longest * (self.hops + 2))
        noise, ends = repeated([source.encode(sentence) for sentence in NOISE], room)
        places = [
            place for _ in chains for place in sorted(rng.choice(ends, self.hops + 1, replace=False).tolist())
        ]
        context, starts = insert(noise, pieces, places)
        return prompt.sample(context, [name for name, _ in chains[0]], starts[: self.hops + 1])

    def _asked(self, value: str) -> tuple[str, str]:
        """Return the question for a value, and the start of its answer."""
        texts = {"value": value, "count": self.hops + 1}
        return _QUESTION.format(**texts), _PREFIX.format(**texts)

    def _chains(self, rng: np.random.Generator, letters: int) -> tuple[list[list[tuple[str, str]]], str]:
        """Return (variable, what it is assigned) of every chain, and the first chain's value."""
        names: list[str] = []
        while len(names) < self.chains * (self.hops + 1):
            name = "".join(string.ascii_uppercase[i] for i in rng.integers(0, 26, letters))
            if name not in names:
                names.append(name)
        values = (rng.choice(90000, self.chains, replace=False) + 10000).tolist()
        chains = []
        for i, value in enumerate(values):
            own = names[i * (self.hops + 1) : (i + 1) * (self.hops + 1)]
            chains.append(list(zip(own, [str(value), *own[:-1]], strict=True)))
        return chains, str(values[0])

    def _example(self, rng: np.random.Generator) -> str:
        """Return a short question with its answer; its variables have three letters, so no answer's name."""
        chains, value = self._chains(rng, letters=3)
        sentences = [NOISE[i % len(NOISE)] for i in range(_EXAMPLE_SENTENCES)]
        for chain in chains:
            places = sorted(rng.choice(_EXAMPLE_SENTENCES, self.hops + 1, replace=False).tolist())
            for i, (place, text) in enumerate(zip(places, _statements(chain), strict=True)):
                sentences.insert(place + i, " " + text)
        answer = " ".join(name for name, _ in chains[0])
        question, prefix = self._asked(value)
        return f"{_BEFORE}{''.join(sentences).strip()}{question}{prefix}{answer}\n\n"


def _statements(chain: list[tuple[str, str]]) -> list[str]:
    return [f"VAR {name} = {value if value.isdigit() else f'VAR {value}'}" for name, value in chain]


create = VariableTracking
