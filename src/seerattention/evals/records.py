"""Samples as lines of JSON: appended one by one, so that a killed run loses none and repeats none."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from seerattention.files import locked, write_whole
from seerattention.settings import typed


@dataclass(frozen=True)
class Record:
    """What one method made of one sample.

    Attributes:
        of: Fingerprint of everything the result follows from but the seed.
        method: The method's label.
        policy: How much it was told to read; empty if dense.
        task: The task's label.
        metric: ``share`` or ``loss``.
        length: Tokens asked for.
        tokens: Tokens of the prompt.
        density_asked: Fraction of the causally valid blocks; None where the policy has no density.
        density: The fraction that was read, over all layers and heads of the prefill.
        seed: The sample's.
        expected: The right answers.
        depths: Where in the prompt they stand, 0 to 1.
        answer: What the model said.
        score: By the metric; None where the numbers were not finite.
        prefill_s: Seconds until the first token of the answer.
        seconds: Seconds in all.
        faults: What is wrong with the sample, by name.
        by_position: (first position, end, mean loss) of parts of a window.
    """

    of: str
    method: str
    policy: str
    task: str
    metric: str
    length: int
    tokens: int
    density_asked: float | None
    density: float
    seed: int
    expected: list[str]
    depths: list[float]
    answer: str
    score: float | None
    prefill_s: float
    seconds: float
    faults: list[str]
    by_position: list[tuple[int, int, float]]

    @property
    def key(self) -> tuple[str, int]:
        """What no two records share."""
        return self.of, self.seed


class RecordFile:
    """The records of a folder, ``samples.jsonl``; a context that keeps other processes from writing.

    Opening it reads what is there. Lines that are no record are dropped from the file, and named in
    ``corrupt``: whoever wants their samples makes them again.

    Args:
        folder: Where it is; made if it does not exist.
        readonly: Only read what is there, and change nothing.

    Raises:
        OSError: If the folder cannot be written.
        ValueError: If another process is writing there.
    """

    def __init__(self, folder: Path, *, readonly: bool = False) -> None:
        self.path = folder / "samples.jsonl"
        self.corrupt: list[str] = []
        self.records: dict[tuple[str, int], Record] = {}
        with ExitStack() as lock:
            if not readonly:
                lock.enter_context(locked(folder))
            text = self.path.read_bytes() if self.path.exists() else b""
            good = b"".join(line + b"\n" for line in self._read(text))
            if not readonly and (self.corrupt or (text and not text.endswith(b"\n"))):
                write_whole(self.path, lambda path: path.write_bytes(good))
            self._lock = lock.pop_all()

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def append(self, record: Record) -> None:
        """Add a record; it is on the disk when this returns."""
        line = json.dumps(asdict(record), ensure_ascii=False, allow_nan=False) + "\n"
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode())
            os.fsync(file.fileno())
        self.records[record.key] = record

    def _read(self, text: bytes) -> list[bytes]:
        good = []
        for number, line in enumerate(text.split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                record = _parsed(json.loads(line))
            except (ValueError, TypeError, RecursionError) as error:
                self.corrupt.append(f"{self.path}, line {number}: {error}")
                continue
            if record.key not in self.records:
                self.records[record.key] = record
                good.append(line)
        return good


def _parsed(content: Any) -> Record:
    kinds = _kinds()
    if not isinstance(content, dict) or set(content) != set(kinds):
        raise ValueError("not the fields of a sample")
    return Record(**{name: typed(name, value, kinds[name]) for name, value in content.items()})


@cache
def _kinds() -> dict[str, Any]:
    return get_type_hints(Record)
