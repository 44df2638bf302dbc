"""Needles in a haystack: numbers by name, hidden in a text and asked for behind it.

Source: RULER (arXiv 2404.06654), section 3.1 and its published code: the wording, 7-digit numbers, keys of
two words joined by a hyphen, 128 tokens for the answer. Differences: the essays are the given text, needles
stand at any of its sentence ends instead of 40 depths, and pieces are tokenised one by one, so that a prompt
has exactly the length asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np

from seerattention.evals.tasks._base import Generated, Prompt, Sample, Source, rng_of
from seerattention.measure.needle import COLOURS, THINGS, insert
from seerattention.wording import RULER

Haystack = Literal["text", "noise", "needles"]

#: The sentences of RULER's noise.
NOISE = (
    " The grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)

_NEEDLE = RULER.needle.strip()
_ONE = (RULER.before, RULER.question, RULER.answer)
_MANY = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz "
    "you about the numbers afterwards.\n",
    "\nWhat are all the special magic numbers for {key} mentioned in the provided text?",
    " The special magic numbers for {key} mentioned in the provided text are",
)


@dataclass(frozen=True)
class Niah(Generated):
    """A needle task.

    Attributes:
        name: The task's, from which its random numbers follow.
        keys: Names in the text.
        values: Numbers of each name.
        queries: Names asked for.
        haystack: ``text``, the given one; ``noise``, RULER's five sentences again and again; ``needles``,
            numbers of other names.

    Raises:
        ValueError: If an option is out of range.
    """

    name: str
    keys: int = 1
    values: int = 1
    queries: int = 1
    haystack: Haystack = "text"
    new_tokens: ClassVar[int] = 128

    def __post_init__(self) -> None:
        most = len(COLOURS) * len(THINGS) - 1
        if not (1 <= self.queries <= self.keys <= most) or self.values < 1:
            raise ValueError(
                f"{self.name} needs 1 <= queries <= keys <= {most} and values >= 1, "
                f"got queries={self.queries}, keys={self.keys}, values={self.values}"
            )
        if self.haystack not in get_args(Haystack):
            raise ValueError(
                f"{self.name}: haystack must be one of {', '.join(get_args(Haystack))}, got {self.haystack!r}"
            )

    def make(self, source: Source, length: int, seed: int) -> Sample:
        """Make a sample; see `Task.make`."""
        rng = rng_of(self.name, length, seed)
        names = rng.permutation(len(COLOURS) * len(THINGS))
        numbers = _distinct_numbers(rng, self.keys * self.values)
        keys = [_key(i) for i in names[: self.keys]]
        asked = sorted(rng.choice(self.keys, self.queries, replace=False).tolist())
        query = _listed([keys[i] for i in asked])
        single = self.queries * self.values == 1
        before, question, prefix = (text.format(key=query) for text in (_ONE if single else _MANY))
        prompt = Prompt(self.name, source, length, self.new_tokens, before, question, prefix)
        join = " " if self.haystack == "text" else "\n"
        needles = [
            source.encode(join + _NEEDLE.format(key=key, value=numbers[i * self.values + j]))
            for i, key in enumerate(keys)
            for j in range(self.values)
        ]
        room = prompt.room - sum(map(len, needles))
        # Sentences of a novel are rarely longer than this; the haystack says if they are.
        prompt.check(room, 32 * (len(needles) + 1))
        text, ends = self._haystack(source, room, rng, names[self.keys :], set(numbers))
        if len(ends) < len(needles):
            raise ValueError(
                f"{self.name}: {len(needles)} needles need as many ends of sentences, {room} tokens of the "
                f"text have {len(ends)}; ask for a longer length"
            )
        places = rng.choice(ends, len(needles), replace=False).tolist()
        context, starts = insert(text, needles, places)
        wanted = [i * self.values + j for i in asked for j in range(self.values)]
        return prompt.sample(context, [numbers[i] for i in wanted], [starts[i] for i in wanted])

    def _haystack(
        self, source: Source, room: int, rng: np.random.Generator, others: np.ndarray, taken: set[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return ``room`` tokens and the places between sentences of them."""
        if self.haystack == "text":
            if len(source.haystack) < room:
                raise ValueError(
                    f"{self.name}: the text has {len(source.haystack)} tokens, {room} are needed; give more"
                )
            start = int(rng.integers(0, len(source.haystack) - room + 1))
            part = slice(start, start + room)
            return source.haystack[part], np.flatnonzero(source.sentence_ends[part]) + 1
        if self.haystack == "noise":
            return repeated([source.encode(sentence) for sentence in NOISE], room)
        lines, total = [], 0
        while total < room:
            key = _key(int(others[len(lines) % len(others)]))
            number = _distinct_numbers(rng, 1, taken)[0]
            lines.append(source.encode("\n" + _NEEDLE.format(key=key, value=number)))
            total += len(lines[-1])
        return repeated(lines, room)


def repeated(pieces: list[np.ndarray], room: int) -> tuple[np.ndarray, np.ndarray]:
    """Repeat pieces to ``room`` tokens, the last one cut; return them and the places behind whole pieces."""
    lengths = [len(piece) for piece in pieces]
    times = room // sum(lengths) + 1
    ends = np.cumsum(lengths * times)
    return np.concatenate(pieces * times)[:room], ends[ends <= room]


def _key(index: int) -> str:
    return f"{COLOURS[index // len(THINGS)]}-{THINGS[index % len(THINGS)]}"


def _distinct_numbers(rng: np.random.Generator, count: int, taken: set[str] | None = None) -> list[str]:
    """Draw 7-digit numbers, none of them twice; they are added to ``taken``."""
    taken = set() if taken is None else taken
    found: list[str] = []
    while len(found) < count:
        number = str(rng.integers(10**6, 10**7))
        if number not in taken:
            taken.add(number)
            found.append(number)
    return found


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"
