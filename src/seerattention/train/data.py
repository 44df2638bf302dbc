"""Text as training sequences, each a pure function of its step: a resumed run reads what comes next."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

from seerattention.files import json_lines, read_text

#: What files of code end in, each of which is a text.
CODE = (
    ".c", ".cc", ".cpp", ".cs", ".cu", ".go", ".h", ".hpp", ".java", ".jl", ".js", ".kt", ".lua", ".php",
    ".py", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".ts",
)  # fmt: skip

#: What files of text end in.
TEXTS = (".txt", ".jsonl", *CODE)


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

    def identity(self) -> str:
        """Return a fingerprint of all steps."""
        return text_identity(self.tokens, np.array([self.length, self.sequences, self.seed]))


@dataclass(frozen=True)
class Packed:
    """Sequences of several documents each; attention, blocks and positions restart at every document.

    Attributes:
        tokens: int64 ``[B, T]``.
        lengths: Tokens of each document of each row; a row's add up to ``T``.
    """

    tokens: np.ndarray
    lengths: tuple[tuple[int, ...], ...]


class Packs:
    """Documents packed into sequences of one length, in the order they come.

    A document that does not fit is cut; its rest goes on in the next sequence as a document of its own.
    Where fewer than ``least`` tokens are left in a sequence, zeros fill it: as a document too short to be
    learned from. Steps are a pure function of their number: asking for another than the next one reads
    the documents again from the start.

    Args:
        documents: The documents' tokens, int ``[n]`` each; or what gives them from the start, the same ones
            every time.
        length: Tokens per sequence.
        sequences: Sequences per step.
        least: Documents, and rests of documents, of fewer tokens are dropped, and counted in ``dropped``.

    Raises:
        ValueError: If the length is below ``least``, or there is no document long enough.
    """

    def __init__(
        self,
        documents: Sequence[np.ndarray] | Callable[[], Iterable[np.ndarray]],
        length: int,
        sequences: int,
        least: int,
    ) -> None:
        if length < least:
            raise ValueError(f"length {length} is below {least} tokens, the least a gate can learn from")
        self.documents, self.length, self.sequences, self.least = documents, length, sequences, least
        self.dropped = 0
        self._last: tuple[int, Packed] | None = None
        self._next, self._rows = 0, self._pack()

    def __call__(self, step: int) -> Packed:
        """Return the sequences of a step."""
        if self._last is not None and self._last[0] == step:
            return self._last[1]
        if step < self._next:
            self._next, self._rows, self.dropped = 0, self._pack(), 0
        while True:
            rows = [next(self._rows) for _ in range(self.sequences)]
            self._next += 1
            if self._next > step:
                break
        packed = Packed(np.stack([tokens for tokens, _ in rows]), tuple(lengths for _, lengths in rows))
        self._last = step, packed
        return packed

    def identity(self) -> str:
        """Return a fingerprint of all steps; where documents are read as they come, of the first alone."""
        first = self(0)
        known = () if callable(self.documents) else self.documents
        return text_identity(*first.tokens, *map(np.array, first.lengths), *known)

    def _pack(self) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
        row: list[np.ndarray] = []
        room = self.length
        for document in self._long_enough():
            rest = document
            while len(rest) >= self.least:
                part, rest = rest[:room], rest[room:]
                row.append(part)
                room -= len(part)
                if room < self.least:
                    if room:
                        row.append(np.zeros(room, np.int64))
                    yield np.concatenate(row).astype(np.int64), tuple(map(len, row))
                    row, room = [], self.length

    def _long_enough(self) -> Iterator[np.ndarray]:
        """Go through the documents again and again."""
        while True:
            found = False
            for document in self.documents() if callable(self.documents) else self.documents:
                if len(document) >= self.least:
                    found = True
                    yield document
                else:
                    self.dropped += 1
            if not found:
                raise ValueError(
                    f"no document has {self.least} tokens (4 blocks), {self.dropped} were shorter; "
                    "give longer text, or train without packing"
                )


def text_identity(*texts: np.ndarray) -> str:
    """Return a fingerprint of tokens, int ``[n]`` each."""
    digest = hashlib.sha256()
    for tokens in texts:
        digest.update(len(tokens).to_bytes(8, "little") + tokens.astype(np.int64).tobytes())
    return digest.hexdigest()[:16]


def dataset_documents(
    name: str, tokenizer: PreTrainedTokenizerBase, *, split: str = "train"
) -> Callable[[], Iterator[np.ndarray]]:
    """Return the documents of a Hugging Face dataset, streamed, for `Packs`.

    Args:
        name: Hub id, with ``:configuration`` behind it where there are several.
        tokenizer: The model's; its chat template writes rows with ``messages``.
        split: Which split.

    Raises:
        ModuleNotFoundError: If ``datasets`` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ModuleNotFoundError(
            "a dataset needs the package datasets: pip install 'seerattention[train]'"
        ) from error
    from seerattention.hosts.transformers.load import outside

    path, _, configuration = name.partition(":")
    with outside(f"the dataset {name} cannot be read"):
        stream = datasets.load_dataset(path, configuration or None, split=split, streaming=True)

    def documents() -> Iterator[np.ndarray]:
        with outside(f"the dataset {name} cannot be read"):
            for row in stream:
                yield row_tokens(row, tokenizer)

    return documents


def text_files(paths: Sequence[str | Path]) -> list[Path]:
    """Return the files of text, folders by what they and theirs hold, hidden ones left out; nothing is read.

    Raises:
        FileNotFoundError: If a path does not exist, or a folder has no such file.
        ValueError: If a file is of another kind.
    """
    found = []
    for path in map(Path, paths):
        files = sorted(_inside(path)) if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f"{path} holds no .txt, no .jsonl and no file of code")
        if not path.exists():
            raise FileNotFoundError(f"there is no file {path}")
        if files[0].suffix not in TEXTS:
            raise ValueError(f"{path} is neither .txt nor .jsonl, nor code that is known by its name")
        found += files
    return found


def _inside(folder: Path) -> Iterator[Path]:
    """Yield the files of text in a folder and its folders."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _inside(path)
        elif path.suffix in TEXTS and path.is_file():
            # No link to nothing, and no pipe, which would be waited for.
            yield path


def text_documents(
    paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase
) -> Callable[[], Iterator[np.ndarray]]:
    """Return the documents of local files for `Packs`; see `read_tokens` for the files."""

    def documents() -> Iterator[np.ndarray]:
        from tqdm.auto import tqdm

        files = text_files(paths)
        size = sum(file.stat().st_size for file in files)
        # For who waits before a terminal: a library of books takes minutes.
        with tqdm(
            desc="reading text", total=size, unit="B", unit_scale=True, delay=2, leave=False, disable=None
        ) as bar:
            for file in files:
                for where, row in _rows(file):
                    try:
                        tokens = row_tokens(row, tokenizer, bar.update)
                    except ValueError as error:
                        raise ValueError(f"{where}: {error}") from error
                    yield tokens

    return documents


def row_tokens(
    row: Any, tokenizer: PreTrainedTokenizerBase, done: Callable[[int], object] | None = None
) -> np.ndarray:
    """Tokenise a row: its ``messages`` by the chat template, else its ``text`` with an end token behind.

    ``done`` is called with the size of what was read, in bytes.

    Raises:
        ValueError: If it has neither, they are no text, or the tokenizer has no chat template for them.
    """
    from seerattention.hosts.transformers.text import encoded

    if not isinstance(row, Mapping):
        raise ValueError(f'expected {{"text": "..."}}, got a {type(row).__name__}')
    if row.get("messages") is not None:
        return encoded(_chat(row["messages"], tokenizer), tokenizer, done)
    if not isinstance(row.get("text"), str):
        raise ValueError(f"a row must have text or messages, this one has {sorted(row)}")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return np.append(encoded(row["text"], tokenizer, done), np.array(end, np.int64))


def _chat(messages: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    from seerattention.hosts.transformers.text import chat_text

    if not tokenizer.chat_template:
        raise ValueError("rows with messages need a tokenizer with a chat template; give text instead")
    if not isinstance(messages, Sequence) or not all(isinstance(one, Mapping) for one in messages):
        raise ValueError('messages must be a list of {"role": "...", "content": "..."}')
    return chat_text(list(messages), tokenizer)


def read_tokens(paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Read texts and tokenise them, an end token behind each.

    Args:
        paths: ``.txt`` files, ``.jsonl`` files whose lines hold ``{"text": ...}`` or
            ``{"messages": [...]}``, files of ``CODE``, or folders of them.
        tokenizer: The model's.

    Returns:
        int64 ``[n]``.

    Raises:
        FileNotFoundError: If a path does not exist or there is no such file.
        ValueError: If a file is of another kind or no UTF-8, a line of a ``.jsonl`` cannot be read, or all
            are empty.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts = list(text_documents(paths, tokenizer)())
    tokens = np.concatenate(parts) if parts else np.empty(0, np.int64)
    if len(tokens) <= len(parts) * len(end):
        raise ValueError(f"there is no text in {', '.join(map(str, paths))}")
    return tokens


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield every row of a file, and where it stands."""
    if file.suffix == ".jsonl":
        yield from json_lines(file)
    else:
        yield str(file), {"text": read_text(file)}
