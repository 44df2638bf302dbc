"""Text as training sequences, each a pure function of its step: a resumed run reads what comes next."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TextWindows:
    """Random windows of a text.

    Attributes:
        tokens: int ``[n]``.
        length: Tokens per sequence.
        sequences: Sequences per step.
        seed: Of the windows' places.
    """

    tokens: np.ndarray
    length: int
    sequences: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < 1 or self.sequences < 1:
            raise ValueError(
                f"length and sequences must be at least 1, got {self.length} and {self.sequences}"
            )
        if len(self.tokens) < self.length:
            raise ValueError(
                f"the text has {len(self.tokens)} tokens, fewer than one sequence of {self.length}; "
                "give more text or a shorter length"
            )

    def __call__(self, step: int) -> np.ndarray:
        """Return the sequences of a step, int64 ``[sequences, length]``."""
        rng = np.random.default_rng((self.seed, step))
        starts = rng.integers(0, len(self.tokens) - self.length + 1, self.sequences)
        return np.stack([self.tokens[s : s + self.length] for s in starts]).astype(np.int64)


def read_tokens(paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Read texts and tokenise them, an end token behind each.

    Args:
        paths: ``.txt`` files, ``.jsonl`` files whose lines hold ``{"text": ...}``, or folders of them.
        tokenizer: The model's.

    Returns:
        int64 ``[n]``.

    Raises:
        FileNotFoundError: If a path does not exist or there is no such file.
        ValueError: If a file is of another kind, a line of a ``.jsonl`` cannot be read, or all are empty.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts = []
    for path in paths:
        for text in _texts(path):
            parts.append(np.array([*tokenizer.encode(text, add_special_tokens=False), *end], dtype=np.int64))
    tokens = np.concatenate(parts) if parts else np.empty(0, np.int64)
    if len(tokens) <= len(parts) * len(end):
        raise ValueError(f"there is no text in {', '.join(map(str, paths))}")
    return tokens


def _texts(path: Path) -> Iterator[str]:
    if path.is_dir():
        files = [f for f in sorted(path.iterdir()) if f.suffix in (".txt", ".jsonl")]
        if not files:
            raise FileNotFoundError(f"{path} holds no .txt and no .jsonl file")
        for file in files:
            yield from _texts(file)
    elif not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    elif path.suffix == ".txt":
        yield path.read_text(encoding="utf-8")
    elif path.suffix == ".jsonl":
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                yield json.loads(line)["text"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f'{path}, line {number}: expected {{"text": "..."}} ({error})') from error
    else:
        raise ValueError(f"{path} is neither .txt nor .jsonl")
