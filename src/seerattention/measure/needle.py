"""Needles in a haystack: key/number pairs hidden in a long text and asked for at its end.

Documents are a pure function of a seed, and cheap enough to train on. All questions of a document are
answered in one pass: the answers stand in the text, and an answer counts if every digit of it would have been
predicted, which is what greedy decoding would have done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from seerattention.hosts.transformers.text import bos_of, chat_text
from seerattention.wording import RULER, TEACHERS, Wording

#: Words that names are made of.
COLOURS = (
    "amber azure black blue bronze brown copper coral crimson cyan golden gray green indigo ivory jade "
    "lemon lilac lime maroon mauve navy ochre olive orange pearl pink plum purple red ruby russet rusty "
    "saffron scarlet silver tan teal violet white yellow"
).split()
THINGS = (
    "anchor apple arrow badge barrel basket beacon bell bottle bridge bucket button candle carpet castle "
    "chair clock compass cradle crown curtain dagger drum engine feather fiddle flag fountain garden gate "
    "glove hammer harbor hat helmet island jacket kettle key ladder lamp lantern letter lock mirror "
    "needle oven paddle pillow pipe plate pocket ribbon ring rocket saddle scarf shield ship shovel "
    "spoon stove table tent tower trumpet tunnel umbrella vase violin wagon wheel whistle window"
).split()

#: Stands for what is said while a chat template is written around it.
_MARK = "\N{REPLACEMENT CHARACTER}"


def wordings(tokenizer: Any) -> list[Wording]:
    """Return what a model may understand: `TEACHERS`, `RULER`, and the latter as a chat if it has a template.

    Args:
        tokenizer: The model's.
    """
    bos = str(tokenizer.bos_token) if len(bos_of(tokenizer)) else ""
    found = [TEACHERS, replace(RULER, before=bos + RULER.before)]
    if tokenizer.chat_template:
        messages = [{"role": role, "content": _MARK} for role in ("user", "assistant") * 2]
        try:
            parts = chat_text(messages, tokenizer).split(_MARK)
        except ValueError:
            # A template that asks for other roles, or contents of other types.
            return found
        # A template that says a message twice, or not at all, is no frame for a text.
        if len(parts) == len(messages) + 1:
            begin, reply, ask, *_ = parts
            chat = replace(
                RULER,
                name=f"{RULER.name}, in the chat template",
                before=begin + RULER.before,
                question=RULER.question + reply,
                answer=RULER.answer.strip(),
                end=RULER.end.strip() + ask,
            )
            found.append(chat)
    return found


def insert(
    context: np.ndarray, pieces: Sequence[np.ndarray], places: Sequence[int]
) -> tuple[np.ndarray, list[int]]:
    """Put pieces before the context's tokens at ``places``, int64; return all, and where each piece begins.

    Pieces of one place follow one another as they are given.
    """
    order = sorted(range(len(pieces)), key=lambda i: places[i])
    parts, starts, done, total = [], [0] * len(pieces), 0, 0
    for i in order:
        total += places[i] - done
        parts += [context[done : places[i]], pieces[i]]
        starts[i], done = total, places[i]
        total += len(pieces[i])
    return np.concatenate([*parts, context[done:]]), starts


@dataclass(frozen=True)
class NeedleDocument:
    """A document with needles and the questions about them.

    Attributes:
        tokens: int64 ``[length]``.
        answers: (start, stop) of each answer's tokens, in order of appearance.
        keys: What each question asks for.
        values: The digits of each answer.
        places: (start, stop) of each answer's needle, in the same order.
    """

    tokens: np.ndarray
    answers: tuple[tuple[int, int], ...]
    keys: tuple[str, ...]
    values: tuple[str, ...]
    places: tuple[tuple[int, int], ...] = ()

    @property
    def query_positions(self) -> np.ndarray:
        """Positions whose logits predict the answers, int64, in order."""
        return np.concatenate([np.arange(start - 1, stop - 1) for start, stop in self.answers])

    def correct(self, predictions: np.ndarray) -> int:
        """Count the answers predicted right in every digit.

        Args:
            predictions: The most likely next token at each of ``query_positions``.
        """
        right = np.asarray(predictions) == self.tokens[self.query_positions + 1]
        lengths = [stop - start for start, stop in self.answers]
        return sum(bool(part.all()) for part in np.split(right, np.cumsum(lengths)[:-1]))


class NeedleTask:
    """Makes needle documents.

    Args:
        tokenizer: The model's, or what has its ``encode``.
        haystack: Tokens of ordinary text, int ``[n]``; documents are windows of it.
        num_needles: Key/number pairs per document.
        digits: Digits per number.
        wording: What states them and asks for them.

    Raises:
        ValueError: If there are more needles than keys, or no digits.
    """

    def __init__(
        self,
        tokenizer: Any,
        haystack: np.ndarray,
        num_needles: int = 8,
        digits: int = 5,
        wording: Wording = TEACHERS,
    ) -> None:
        names = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
        self.num_needles = num_needles
        self.digits = digits
        self.haystack = np.asarray(haystack)
        self.wording = wording
        self._tokenizer = tokenizer
        # Names of few tokens, so that eight questions fit into the last two blocks of 64 tokens.
        lengths = [len(self._encode(" " + name)) for name in names]
        short = [name for name, length in zip(names, lengths, strict=True) if length <= min(lengths) + 1]
        if not 1 <= num_needles <= len(short) or digits < 1:
            raise ValueError(
                f"needles must be 1 to {len(short)} and digits at least 1, got {num_needles}, {digits}"
            )
        self.names = short
        self._before, self._end = self._encode(wording.before), self._encode(wording.end)

    def _encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)

    def _asked(self, key: str, value: str) -> tuple[np.ndarray, int]:
        """Return the tokens of a question and its answer, and how many of them come before the number."""
        # Not format: a chat template may hold braces.
        question = (self.wording.question + self.wording.answer).replace("{key}", key) + " "
        # The space may be a token of its own or part of the number's first one.
        ahead, whole = self._encode(question), self._encode(question + value)
        same = min(len(ahead), len(whole))
        return whole, int((ahead[:same] == whole[:same]).cumprod().sum())

    def make(
        self,
        length: int,
        seed: int,
        *,
        questions: Literal["end", "spread"] = "end",
        num_needles: int | None = None,
    ) -> NeedleDocument:
        """Make one document.

        Args:
            length: Tokens of the document.
            seed: Everything random follows from it.
            questions: ``end`` puts them all behind the text; ``spread`` scatters them over its second
                half (for training), each behind its needle.
            num_needles: Overrides the task's number.

        Raises:
            ValueError: If the needles and questions do not fit, or the haystack is too short.
        """
        rng = np.random.default_rng(seed)
        count = num_needles or self.num_needles
        keys = [self.names[pick] for pick in rng.choice(len(self.names), count, replace=False)]
        values = ["".join(map(str, row)) for row in rng.integers(0, 10, (count, self.digits))]
        needles = [
            self._encode(self.wording.needle.format(key=key, value=value))
            for key, value in zip(keys, values, strict=True)
        ]
        order = rng.permutation(count)
        answered = [self._asked(keys[i], values[i]) for i in order]
        asked = [np.concatenate([tokens, self._end]) for tokens, _ in answered]
        room = length - len(self._before) - sum(map(len, needles + asked))
        if room < 4 * count:
            raise ValueError(
                f"{count} needles and their questions take {length - room} tokens; "
                f"a document of {length} is too short, ask for at least {length - room + 4 * count}"
            )
        if len(self.haystack) < room:
            raise ValueError(f"the haystack has {len(self.haystack)} tokens, {room} are needed")
        start = int(rng.integers(0, len(self.haystack) - room + 1))
        text = self.haystack[start : start + room].astype(np.int64)
        where = rng.integers(0, room if questions == "end" else room // 2, count).tolist()
        if questions == "end":
            where += [room] * count
        else:
            where += rng.integers(room // 2, room + 1, count).tolist()
        context, starts = insert(text, needles + asked, where)
        starts = [len(self._before) + start for start in starts]
        appear = sorted(range(count), key=lambda i: starts[count + i])
        asked_for = [int(order[i]) for i in appear]
        return NeedleDocument(
            tokens=np.concatenate([self._before, context]),
            answers=tuple(
                (starts[count + i] + answered[i][1], starts[count + i] + len(answered[i][0])) for i in appear
            ),
            keys=tuple(keys[i] for i in asked_for),
            values=tuple(values[i] for i in asked_for),
            places=tuple((starts[i], starts[i] + len(needles[i])) for i in asked_for),
        )
