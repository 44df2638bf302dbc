"""Text in which something must be looked up: windows that ask for what stands in them, or repeat it.

In ordinary text little of what stands far back must be looked up. Everything is made from the training text
and the model's own tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from seerattention.hosts.transformers.text import bos_of, chat_text
from seerattention.train.data import Packed, Packs, TextWindows, text_identity
from seerattention.wording import RULER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Statements and the questions for them. Several, so that it is looking up that is learned, not a wording.
WORDINGS = (
    (RULER.needle, RULER.question, RULER.answer + " {value}"),
    ("\nThe number of the {key} is {value}.\n", "\nWhat is the number of the {key}?", " It is {value}"),
    (" Remember that {key} means {value}.", "\nWhat does {key} mean?", " {key} means {value}"),
    ('\n"{key}": "{value}",\n', '\nLook up "{key}".', ' "{key}": "{value}"'),
)

#: Tokens of a sequence per statement, at the least.
ROOM = 160
#: The most statements in a sequence.
MOST = 48
#: Tokens of a passage that returns.
PASSAGE = (16, 512)
#: Share of the sequences with questions that are a chat, where the tokenizer's template writes such.
CHATS = 0.5

_MARK = "\N{REPLACEMENT CHARACTER}"


def check_shares(retrieval: float, repeats: float) -> None:
    """Refuse what are no shares of the sequences.

    Raises:
        ValueError: If one is negative, or both together are more than 1.
    """
    if not (retrieval >= 0 and repeats >= 0 and retrieval + repeats <= 1):
        raise ValueError(
            "retrieval and repeats are shares of the sequences, at least 0 and together at most 1; got "
            f"{retrieval} and {repeats}, give both"
        )


@dataclass(frozen=True)
class Mixture:
    """Windows of text, some of them made into questions about themselves, in some a passage returning.

    Steps are a pure function of their number, as those of the text are.

    Attributes:
        text: The windows, or packs of documents; a pack that is changed becomes one document.
        tokenizer: The model's.
        retrieval: Share of the sequences that state things and ask for them.
        repeats: Share of the sequences in which passages return, half of them of tokens in no order.
        seed: Of what is changed, and how.

    Raises:
        ValueError: If the shares are no shares, or both together more than 1.
    """

    text: TextWindows | Packs
    tokenizer: PreTrainedTokenizerBase
    retrieval: float = 0.0
    repeats: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_shares(self.retrieval, self.repeats)

    def __call__(self, step: int) -> np.ndarray | Packed:
        """Return the sequences of a step."""
        batch = self.text(step)
        made = _tokens(batch).copy()
        lengths: list[tuple[int, ...]] = [(self.length,)] * len(made)
        if isinstance(batch, Packed):
            lengths = list(batch.lengths)
        for i, row in enumerate(made):
            rng = np.random.default_rng((self.seed, step, i, 1))
            if (change := self.change(rng.random())) is None:
                continue
            # What pads a pack is too short for a document.
            end = sum(n for n in lengths[i] if n >= getattr(self.text, "least", 0))
            made[i, :end] = change(row[:end].copy(), rng)
            lengths[i] = (end, len(row) - end) if end < len(row) else (end,)
        return Packed(made, tuple(lengths)) if isinstance(batch, Packed) else made

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        return self.text.length

    @property
    def dropped(self) -> int:
        """Documents of the text that were too short."""
        return getattr(self.text, "dropped", 0)

    def identity(self) -> str:
        """Return a fingerprint of all steps."""
        shares = np.array([round(1e6 * share) for share in (self.retrieval, self.repeats)])
        example = self.asking(_tokens(self.text(0))[0], np.random.default_rng(self.seed))
        return self.text.identity() + text_identity(shares, np.array([self.seed]), example)

    def change(self, drawn: float) -> Callable[[np.ndarray, np.random.Generator], np.ndarray] | None:
        """Return what makes a sequence, by a number drawn from [0, 1); None leaves it as it is."""
        if drawn < self.retrieval:
            return self.asking
        return self.repeating if drawn < self.retrieval + self.repeats else None

    def asking(self, row: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return a sequence of as many tokens that states things and asks for some, int64 ``[length]``.

        A text with questions scattered over its second half or all behind it; or the first message of a chat
        and its answers.
        """
        count = int(rng.integers(1, 1 + max(1, min(MOST, len(row) // ROOM))))
        wording = WORDINGS[int(rng.integers(len(WORDINGS)))]
        # A name that is drawn twice has one value: there must be one answer.
        drawn = {self._name(rng): self._value(rng) for _ in range(count)}
        facts = [{"key": key, "value": value} for key, value in drawn.items()]
        stated = [self._encode(wording[0].format(**fact)) for fact in facts]
        asked = [tuple(text.format(**fact) for text in wording[1:]) for fact in facts]
        # What a template says by itself may leave no room in a short sequence.
        chat = self._preamble is not None and 2 * self._preamble <= len(row) and rng.random() < CHATS
        scatter = not chat and rng.random() < 0.5
        before, behind = self._asked(asked, chat)
        # What does not fit is not asked.
        while sum(map(len, stated + behind)) > (len(row) - len(before)) // 2 and len(asked) > 1:
            left = 2 * len(asked) // 3
            asked, stated = asked[:left], stated[:left]
            before, behind = self._asked(asked, chat)
        room = len(row) - len(before)
        scattered, behind = (behind, behind[:0]) if scatter else ([], behind)
        behind = np.concatenate([np.empty(0, np.int64), *behind])
        pieces = stated + scattered
        text = row[: max(0, room - len(behind) - sum(map(len, pieces)))]
        half = len(text) // 2
        # What is asked for in the text stands in its first half.
        places = rng.integers(0, 1 + (half if scattered else len(text)), len(stated)).tolist()
        places += rng.integers(half, 1 + len(text), len(scattered)).tolist()
        parts, done = [before], 0
        for i in sorted(range(len(pieces)), key=lambda i: places[i]):
            parts += [text[done : places[i]], pieces[i]]
            done = places[i]
        return np.concatenate([*parts, text[done:], behind])[: len(row)].astype(np.int64)

    def repeating(self, row: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return a sequence in which passages return, int64 ``[length]``."""
        made, length = row.copy(), len(row)
        least, most = PASSAGE[0], min(PASSAGE[1], length // 4)
        if most < least:
            return made
        for _ in range(int(rng.integers(1, 9))):
            size = int(rng.integers(least, most + 1))
            source = int(rng.integers(0, length // 2 - size + 1))
            target = int(rng.integers(source + size, length - size + 1))
            if rng.random() < 0.5:
                # Nothing but looking it up predicts tokens in no order.
                made[source : source + size] = rng.choice(row, size)
            made[target : target + size] = made[source : source + size]
        return made

    def _asked(self, asked: list[tuple[str, ...]], chat: bool) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the tokens before the text, and of every question with its answer."""
        if chat and (frame := self._chat(asked)) is not None:
            return self._encode(frame[0]), [self._encode(part) for part in frame[1]]
        return self._start, [self._encode("".join(pair) + ".\n") for pair in asked]

    def _chat(self, asked: list[tuple[str, ...]]) -> tuple[str, list[str]] | None:
        """Return what a chat has before the text, and of every question with its answer.

        None if the template says a message twice or not at all: it is no frame for a text.
        """
        messages = []
        for i, (question, answer) in enumerate(asked):
            said = _MARK + (question.strip() if i else question)
            messages.append({"role": "user", "content": said})
            messages.append({"role": "assistant", "content": answer.strip()})
        before, *behind = chat_text(messages, self.tokenizer).split(_MARK)
        if len(behind) != len(asked):
            return None
        whole = all(answer.strip() in part for part, (_, answer) in zip(behind, asked, strict=True))
        return (before, behind) if whole else None

    @cached_property
    def _preamble(self) -> int | None:
        """Tokens that a chat has before its first message, None where the tokenizer writes no such chats."""
        if not self.tokenizer.chat_template:
            return None
        try:
            frame = self._chat([(question, answer) for _, question, answer in WORDINGS])
        except ValueError:
            # A template that asks for other roles, or contents of other types.
            return None
        return None if frame is None else len(self._encode(frame[0]))

    @cached_property
    def _start(self) -> np.ndarray:
        """What the tokenizer begins texts with."""
        return bos_of(self.tokenizer)

    @cached_property
    def _words(self) -> list[str]:
        text = str(self.tokenizer.decode(_tokens(self.text(0)).flatten().tolist()))
        return sorted(set(re.findall(r"\b[^\W\d_]{4,10}\b", text)))

    def _name(self, rng: np.random.Generator) -> str:
        """Return two words of the text, or made ones where it has few."""
        return "-".join(self._word(rng) for _ in range(2))

    def _word(self, rng: np.random.Generator) -> str:
        if len(self._words) >= 200 and rng.random() < 0.8:
            return self._words[int(rng.integers(len(self._words)))]
        return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), int(rng.integers(4, 9))))

    def _value(self, rng: np.random.Generator) -> str:
        """Return a number, or words."""
        if rng.random() < 0.7:
            return "".join(map(str, rng.integers(0, 10, int(rng.integers(4, 9)))))
        return self._name(rng)

    def _encode(self, text: str) -> np.ndarray:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return np.array(ids, dtype=np.int64)


def mixed(
    windows: Sequence[np.ndarray],
    tokenizer: PreTrainedTokenizerBase,
    retrieval: float,
    repeats: float,
    seed: int = 0,
) -> list[np.ndarray]:
    """Return windows of which shares are changed as `Mixture` does, as near as whole windows come to them.

    Args:
        windows: int ``[T]`` each, all of one length.
        tokenizer: The model's.
        retrieval: Share of the windows that state things and ask for them.
        repeats: Share of the windows in which passages return.
        seed: Of what is changed.

    Raises:
        ValueError: If the shares are no shares, or both together more than 1.
    """
    text = TextWindows(np.concatenate(windows), len(windows[0]))
    mixture, rng = Mixture(text, tokenizer, retrieval, repeats, seed), np.random.default_rng(seed)
    changes = [mixture.change((i + 0.5) / len(windows)) for i in range(len(windows))]
    return [change(row, rng) if change else row for change, row in zip(changes, windows, strict=True)]


def _tokens(batch: np.ndarray | Packed) -> np.ndarray:
    return batch.tokens if isinstance(batch, Packed) else batch
