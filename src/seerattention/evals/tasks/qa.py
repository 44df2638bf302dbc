"""Questions about one of many documents, from a given file.

Source: RULER (arXiv 2404.06654), section 3.4 and its published code: wording, any of the answers counts, 32
tokens for the answer. Differences: an answer counts as whole words, so that 5 is not found in 2015; other
documents that contain an answer are left out, and the last one is cut, so that a prompt has exactly the
length asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from seerattention.evals.tasks._base import Generated, Prompt, Sample, Source, rng_of, whether_any
from seerattention.files import json_lines, read_json
from seerattention.settings import typed

_ASK = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other "
    "words."
)
_BEFORE = f"{_ASK}\n\nThe following are given documents.\n\n"
_QUESTION = f"\n\n{_ASK}\n\nQuestion: {{}}"
_PREFIX = " Answer:"


@dataclass(frozen=True)
class QA(Generated):
    """The task.

    Attributes:
        file: A ``.jsonl`` with lines ``{"context": ..., "question": ..., "answers": [...]}``, or a
            ``.json`` in the format of SQuAD.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or has fewer than two documents.
    """

    file: str
    new_tokens: ClassVar[int] = 32

    def __post_init__(self) -> None:
        if len({context for context, _, _ in self.entries}) < 2:
            raise ValueError(f"qa: {self.file} has fewer than two documents; give more")

    @cached_property
    def entries(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """(document, question, answers) of the file."""
        return list(_entries(Path(self.file)))

    def score(self, answer: str, expected: Sequence[str]) -> float:
        """Return 1 if any of the expected answers is found, as whole words."""
        return whether_any(answer, expected)

    def make(self, source: Source, length: int, seed: int) -> Sample:
        """Make a sample; see `Task.make`."""
        rng = rng_of("qa", length, seed)
        order = np.random.default_rng(0).permutation(len(self.entries))
        document, asked, answers = self.entries[order[seed % len(order)]]
        others = sorted({context for context, _, _ in self.entries} - {document})
        others = [text for text in others if not any(a.lower() in text.lower() for a in answers)]
        if not others:
            raise ValueError(f"qa: every other document of {self.file} contains an answer to {asked!r}")
        question = _QUESTION.format(asked)
        prompt = Prompt("qa", source, length, self.new_tokens, _BEFORE, question, _PREFIX)
        prompt.check(room := prompt.room, len(source.encode(_numbered(1000, document))))
        chosen = [others[i] for i in rng.permutation(len(others))]
        total, count = 0, 0
        while total < room:
            count += 1
            total += len(source.encode(_numbered(count, chosen[(count - 1) % len(chosen)])))
        # Never the last one, which is cut.
        place = int(rng.integers(0, max(1, count - 1)))
        texts = [chosen[i % len(chosen)] for i in range(count)]
        texts.insert(place, document)
        pieces = [source.encode(_numbered(i, text)) for i, text in enumerate(texts, 1)]
        starts = np.cumsum([0, *map(len, pieces)])
        if starts[place + 1] > room:
            place, pieces = 0, [source.encode(_numbered(1, document)), *pieces[1:]]
        return prompt.sample(np.concatenate(pieces)[:room], answers, [int(starts[place])])


def _numbered(number: int, text: str) -> str:
    return f"Document {number}:\n{text}" if number == 1 else f"\n\nDocument {number}:\n{text}"


def _entries(path: Path) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    if not path.exists():
        raise FileNotFoundError(f"qa: there is no file {path}")
    rows = _squad(read_json(path)) if path.suffix == ".json" else (row for _, row in json_lines(path))
    try:
        for row in rows:
            given = typed("answers", row["answers"], tuple[str | int | float, ...])
            if answers := tuple(str(a) for a in given if str(a).strip()):
                yield str(row["context"]), str(row["question"]), answers
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'qa: {path} must have lines {{"context": ..., "question": ..., "answers": [...]}} or be a .json '
            f"in the format of SQuAD ({error!r})"
        ) from error


def _squad(content: Any) -> Iterator[dict[str, Any]]:
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = list(dict.fromkeys(a["text"] for a in qa["answers"]))
                yield {"context": paragraph["context"], "question": qa["question"], "answers": answers}


create = QA
