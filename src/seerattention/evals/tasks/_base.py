"""What tasks share: the text they are made of, what a sample and its outcome are, greedy answers.

Answers are scored as in RULER (arXiv 2404.06654), section 4, and its published code: ``string_match_all``,
``string_match_part`` and ``postprocess_pred`` of its evaluation, here per sample and in 0 to 1, not per cent.
"""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from seerattention.hosts.transformers import cache_argument
from seerattention.hosts.transformers.text import bos_of, encoded

#: Stands for the question while a chat template is written around it.
_MARK = "\N{REPLACEMENT CHARACTER}question\N{REPLACEMENT CHARACTER}"

#: Tokens whose text ends so may end a sentence.
_SENTENCE_ENDS = re.compile(r"[.!?][\"'”’)]*\s*$")


_CONTROL = re.compile(r"[\x00-\x1f]")


@dataclass(eq=False)
class Source:
    """A tokenizer and the text that tasks hide things in.

    Attributes:
        tokenizer: The model's.
        documents: Token numbers of each document, int ``[n]``, without special tokens.
        chat: Whether questions are put as a user's message in the tokenizer's chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    documents: Sequence[np.ndarray]
    chat: bool = False
    _pieces: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not sum(map(len, self.documents)):
            raise ValueError("the text is empty; give documents of at least one token")
        if self.chat and not self.tokenizer.chat_template:
            raise ValueError("chat = true needs a tokenizer with a chat template; leave it out")

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a piece of a prompt, int64, without special tokens."""
        if text not in self._pieces:
            self._pieces[text] = encoded(text, self.tokenizer)
        return self._pieces[text]

    @cached_property
    def bos(self) -> np.ndarray:
        """The token that the tokenizer begins texts with, int64 ``[1]``, or ``[0]`` if it has none."""
        return bos_of(self.tokenizer)

    @cached_property
    def frame(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens before and behind every question: BOS where the tokenizer adds it, or the chat template."""
        if self.chat:
            messages = [{"role": "user", "content": _MARK}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            before, _, behind = str(text).partition(_MARK)
            return self.encode(before), self.encode(behind)
        return self.bos, np.empty(0, np.int64)

    @cached_property
    def haystack(self) -> np.ndarray:
        """All documents behind each other, int64 ``[n]``."""
        return np.concatenate([np.asarray(d, dtype=np.int64) for d in self.documents])

    @cached_property
    def sentence_ends(self) -> np.ndarray:
        """Whether a sentence may end with a token of the haystack, bool ``[n]``."""
        kinds, inverse = np.unique(self.haystack, return_inverse=True)
        ends = [bool(_SENTENCE_ENDS.search(str(self.tokenizer.decode([int(token)])))) for token in kinds]
        return np.array(ends)[inverse]

    @cached_property
    def words(self) -> list[str]:
        """The distinct words of 4 to 10 small letters in the text, in alphabetical order."""
        text = str(self.tokenizer.decode(self.haystack.tolist()))
        return sorted(set(re.findall(r"\b[a-z]{4,10}\b", text)))


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        prompt: What the model reads, int64 ``[n]``.
        expected: The right answers; none where likelihood is measured.
        places: Index in the prompt of the first token of the statement that holds each answer; empty where
            answers are no single statement.
        new_tokens: Tokens that the answer may have. The prompt and they take at most the length asked for.
    """

    prompt: np.ndarray
    expected: tuple[str, ...] = ()
    places: tuple[int, ...] = ()
    new_tokens: int = 0

    @property
    def depths(self) -> list[float]:
        """Where in the prompt each answer stands, 0 at its beginning, 1 at its end."""
        return [round(place / len(self.prompt), 4) for place in self.places]


@dataclass(frozen=True)
class Outcome:
    """What a model made of a sample.

    Attributes:
        answer: What it said; empty where likelihood is measured.
        score: By the task's metric; NaN or infinite where the model's numbers were.
        prefill_s: Seconds until the first token of the answer, or until the likelihood of all tokens.
        seconds: Seconds in all.
        by_position: Where likelihood is measured: (first position, end, mean loss in nats) of equal parts.
    """

    answer: str
    score: float
    prefill_s: float
    seconds: float
    by_position: tuple[tuple[int, int, float], ...] = ()


class Task(Protocol):
    """A task; its file's ``create`` makes one from its options.

    Attributes:
        metric: ``share``, of answers in 0 to 1; or ``loss``, in nats per token.
        new_tokens: Tokens generated at most.
    """

    metric: ClassVar[Literal["share", "loss"]]
    new_tokens: ClassVar[int]

    def make(self, source: Source, length: int, seed: int) -> Sample:
        """Make a sample.

        Args:
            source: Tokenizer and text.
            length: Tokens of prompt and answer together, at most; a prompt falls short of it by less than
                the smallest thing it can be filled with, in most tasks a token.
            seed: Everything random follows from it.

        Raises:
            ValueError: If the length is too short, or the text is.
        """
        ...

    def run(self, model: PreTrainedModel, source: Source, sample: Sample) -> Outcome:
        """Ask a model, dense or with something attached."""
        ...


def share_found(answer: str, expected: Sequence[str]) -> float:
    """Return the share of the expected strings that the answer contains, whatever their case."""
    # A newline for every control character, as RULER has it.
    text = _CONTROL.sub("\n", answer.strip()).strip().lower()
    return sum(e.lower() in text for e in expected) / len(expected)


def whether_any(answer: str, expected: Sequence[str]) -> float:
    """Return 1 if the answer contains any expected string as whole words, whatever their case, else 0.

    A letter or digit next to one makes it part of another word: 5 is not in 2015, nor no in know.
    """
    return float(any(_whole(text).search(answer) for text in expected))


def _whole(text: str) -> re.Pattern[str]:
    # Latin letters alone, since others are written without spaces; an end that is none needs no edge.
    edge = "[0-9A-Za-z]"
    before, after = (
        f"(?{look}{edge})" if re.match(edge, end) else ""
        for look, end in (("<!", text[:1]), ("!", text[-1:]))
    )
    return re.compile(before + re.escape(text) + after, re.IGNORECASE)


class Generated:
    """Base of tasks whose answers are generated greedily and scored by the strings they contain."""

    metric: ClassVar[Literal["share", "loss"]] = "share"
    new_tokens: ClassVar[int] = 32

    def score(self, answer: str, expected: Sequence[str]) -> float:
        """Return how right an answer is, 0 to 1."""
        return share_found(answer, expected)

    def run(self, model: PreTrainedModel, source: Source, sample: Sample) -> Outcome:
        """Generate the answer greedily and score it."""
        tokens, prefill_s, seconds = generate(model, sample.prompt, sample.new_tokens)
        answer = str(source.tokenizer.decode(tokens, skip_special_tokens=True))
        return Outcome(answer, self.score(answer, sample.expected), prefill_s, seconds)


@torch.inference_mode()
def generate(model: PreTrainedModel, prompt: np.ndarray, new_tokens: int) -> tuple[list[int], float, float]:
    """Return the most likely next tokens up to the model's end token, seconds to the first, and in all."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = set(ends) if isinstance(ends, list) else {ends}
    cached = cache_argument(model, DynamicCache(config=model.config))
    ids = torch.from_numpy(prompt).to(model.device)[None]
    start, prefill_s, found = time.perf_counter(), 0.0, []
    for _ in range(new_tokens):
        logits = model(ids, **cached, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)
        # Reading the token waits for the device, so these are times of finished work.
        token = int(ids)
        prefill_s = prefill_s or time.perf_counter() - start
        if token in ends:
            break
        found.append(token)
    return found, prefill_s, time.perf_counter() - start


def rng_of(name: str, length: int, seed: int) -> np.random.Generator:
    """Return the random numbers of one sample of a task."""
    return np.random.default_rng([zlib.crc32(name.encode()), length, seed])


class Prompt:
    """A prompt but for its context: what comes before it, the question and the answer's start.

    Attributes:
        room: Tokens that are left for the context beside these, the frame and the answer.
    """

    def __init__(
        self, task: str, source: Source, length: int, new_tokens: int, before: str, question: str, prefix: str
    ) -> None:
        begin, end = source.frame
        self._task, self._length, self._new_tokens = task, length, new_tokens
        self._before = np.concatenate([begin, source.encode(before)])
        self._behind = np.concatenate([source.encode(question), end, source.encode(prefix)])
        self.room = length - new_tokens - len(self._before) - len(self._behind)

    def check(self, room: int, least: int) -> None:
        """Refuse a length that leaves less room than the context needs.

        Raises:
            ValueError: If ``room`` is below ``least``.
        """
        if room < least:
            need = self._length + least - room
            raise ValueError(f"{self._task} needs about {need} tokens, got {self._length}; ask for more")

    def sample(self, context: np.ndarray, expected: Sequence[str], starts: Sequence[int] = ()) -> Sample:
        """Return the sample with its context, and where in that the answers stand."""
        prompt = np.concatenate([self._before, context, self._behind])
        places = tuple(len(self._before) + start for start in starts)
        return Sample(prompt, tuple(expected), places, self._new_tokens)
