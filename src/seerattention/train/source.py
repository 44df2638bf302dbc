"""From files or a dataset to a training run's batches and its held-out windows."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from seerattention.train.data import Packs, TextWindows, dataset_documents, read_tokens, text_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from seerattention.train.mixture import Mixture

#: Windows of held-out text that recall and perplexity are measured on.
HELDOUT_WINDOWS = 4


@dataclass(frozen=True)
class Text:
    """What a run reads.

    Attributes:
        batches: The sequences of a step.
        heldout: Windows that are not trained on, int64 ``[length]`` each.
        size: How much text there is, in words.
        held: Where the windows come from, in words.
    """

    batches: TextWindows | Packs | Mixture
    heldout: list[np.ndarray]
    size: str
    held: str

    def __str__(self) -> str:
        return f"{self.size}; held out: {self.held}"


@dataclass(frozen=True)
class Source:
    """Where text comes from, and how it is cut.

    Attributes:
        text: Training text: .txt, .jsonl, code or folders of them.
        dataset: Instead of text: a Hugging Face dataset, id or id:configuration, streamed.
        split: Split of the dataset.
        packing: Whether whole documents are packed, attention restarting at each, instead of random windows
            of the text; default only for a dataset.
        length: Tokens per sequence.
        sequences: Sequences per step, over all processes.
        heldout: Held-out text, as text; default the end of the text, not trained on.
        seed: Of the order of the text.
    """

    text: tuple[str, ...] = ()
    dataset: str = ""
    split: str = "train"
    packing: bool | None = None
    length: int = 8192
    sequences: int = 1
    heldout: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if bool(self.text) == bool(self.dataset):
            raise ValueError("give training text by either text or dataset")
        for name, least in (("length", 1), ("sequences", 1), ("seed", 0)):
            if not least <= (value := getattr(self, name)) < 2**63:
                raise ValueError(f"{name} must be a whole number >= {least}, got {value}")
        if self.dataset and self.packing is False:
            raise ValueError("a dataset is streamed, so it is always packed; leave packing out")

    def read(self, tokenizer: PreTrainedTokenizerBase, least: int) -> Text:
        """Read the text; the first batch too, so that text nobody can learn from is refused before any work.

        Gates learn from documents of ``least`` tokens or more.

        Raises:
            FileNotFoundError: If a file does not exist.
            ModuleNotFoundError: If a dataset needs a package that is not installed.
            ValueError: If there is too little text, or something else cannot be read.
        """
        if self.length < least:
            raise ValueError(f"length {self.length} is below 4 blocks, {least} tokens; give a longer one")
        given = np.empty(0, np.int64)
        if self.heldout:
            given = read_tokens([Path(path) for path in self.heldout], tokenizer)
        streamed = self._streamed if self.dataset else self._local
        batches, held, size, said = streamed(tokenizer, least, given)
        windows = min(HELDOUT_WINDOWS, len(held) // self.length)
        if not windows:
            raise ValueError(
                f"the held-out text has {len(held)} tokens, fewer than one sequence of "
                f"{self.length}; give more"
            )
        batches(0)
        return Text(batches, list(held[: windows * self.length].reshape(windows, -1)), size, said)

    def _streamed(
        self, tokenizer: PreTrainedTokenizerBase, least: int, held: np.ndarray
    ) -> tuple[Packs, np.ndarray, str, str]:
        documents, skipped, said = dataset_documents(self.dataset, tokenizer, split=self.split), 0, "given"
        if not len(held):
            parts: list[np.ndarray] = []
            for document in documents():
                parts.append(document)
                if sum(map(len, parts)) >= HELDOUT_WINDOWS * self.length:
                    break
            if not parts:
                raise ValueError(f"the dataset {self.dataset} has no rows in split {self.split!r}")
            skipped, held = len(parts), np.concatenate(parts)
            said = f"the first {skipped} documents, not trained on"
        batches = Packs(
            lambda: itertools.islice(documents(), skipped, None), self.length, self.sequences, least
        )
        return batches, held, f"{self.dataset}, streamed", said

    def _local(
        self, tokenizer: PreTrainedTokenizerBase, least: int, held: np.ndarray
    ) -> tuple[Packs | TextWindows, np.ndarray, str, str]:
        paths, said = [Path(path) for path in self.text], "given"
        # An end token inside a chat is no end of a document: its bounds are kept as they are read.
        parts = list(text_documents(paths, tokenizer)()) if self.packing else []
        tokens = np.concatenate(parts) if parts else read_tokens(paths, tokenizer)
        size = f"{len(tokens):,} tokens"
        if not len(held):
            if len(tokens) < 2 * self.length:
                raise ValueError(
                    f"the text has {len(tokens)} tokens, fewer than one sequence of {self.length} to "
                    "train on and one held out; give more text or a shorter length"
                )
            windows = min(HELDOUT_WINDOWS, max(1, len(tokens) // 10 // self.length))
            tokens, held = np.split(tokens, [len(tokens) - windows * self.length])
            said = "the end of the text, not trained on"
        if not self.packing:
            return TextWindows(tokens, self.length, self.sequences, self.seed), held, size, said
        ends = np.cumsum([len(part) for part in parts])
        parts = np.split(tokens, ends[ends < len(tokens)])
        return Packs(parts, self.length, self.sequences, least), held, size, said
