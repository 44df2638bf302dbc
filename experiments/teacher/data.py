"""Books as tokens, and training samples as a pure function of (seed, stage, step, index)."""

from __future__ import annotations

import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from seerattention.measure.needle import NeedleTask


def read_books(sources: list[Path]) -> Iterator[str]:
    """Yield the texts of .txt files, folders of them and .tar.xz archives, in a fixed order."""
    found = False
    for source in sources:
        if source.is_dir():
            yield from read_books(sorted(source.iterdir()))
            found = True
        elif source.name.endswith((".tar.xz", ".tar.gz", ".tar")):
            with tarfile.open(source) as archive:
                for member in sorted(archive.getmembers(), key=lambda m: m.name):
                    if member.isfile() and (file := archive.extractfile(member)) is not None:
                        found = True
                        yield file.read().decode("utf-8", errors="replace")
        elif source.suffix == ".txt":
            found = True
            yield source.read_text(errors="replace")
    if not found:
        sys.exit(
            f"error: no books in {[str(s) for s in sources]}; give .txt files, folders or .tar.xz archives"
        )


def tokenise(sources: list[Path], tokenizer: Any, cache: Path) -> np.ndarray:
    """Return all books as one array of tokens, an end token behind each; kept in ``cache``."""
    if not cache.exists():
        end = tokenizer.convert_tokens_to_ids(tokenizer.eos_token)
        encode = tokenizer.backend_tokenizer.encode_batch
        texts = list(read_books(sources))
        parts = [np.array([*e.ids, end], dtype=np.uint16) for e in encode(texts, add_special_tokens=False)]
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_suffix(".tmp.npy")
        np.save(temporary, np.concatenate(parts))
        temporary.replace(cache)
    return np.load(cache)


class Mixture:
    """Training sequences: windows of books, needle documents, and windows in which a passage returns.

    Half of the returning passages are the book's own, half are its tokens at random: nothing but
    looking them up predicts those, so attention learns to look up early in training.
    """

    def __init__(self, books: np.ndarray, tokenizer: Any, digits: int) -> None:
        self.books = books
        self.task = NeedleTask(tokenizer, books, digits=digits)

    def sequence(self, length: int, seed: tuple[int, ...], *, needles: float, repeats: float) -> np.ndarray:
        """Return one sequence of ``length`` tokens, int64; the shares are those of the two special kinds."""
        rng = np.random.default_rng(seed)
        kind = rng.random()
        if kind < needles:
            return self.task.make(
                length,
                int(rng.integers(2**62)),
                questions="end" if rng.random() < 0.3 else "spread",
                num_needles=int(rng.integers(2, 1 + min(16, length // 48))),
            ).tokens
        start = rng.integers(0, len(self.books) - length)
        window = self.books[start : start + length].astype(np.int64)
        if kind < needles + repeats:
            size = int(rng.integers(32, min(512, length // 4)))
            source = int(rng.integers(0, length // 2 - size))
            target = int(rng.integers(source + size, length - size))
            if rng.random() < 0.5:
                window[source : source + size] = self.books[rng.integers(0, len(self.books), size)]
            window[target : target + size] = window[source : source + size]
        return window

    def batch(self, length: int, sequences: int, seed: tuple[int, ...], **shares: float) -> np.ndarray:
        """Return ``[sequences, length]``."""
        return np.stack([self.sequence(length, (*seed, i), **shares) for i in range(sequences)])
