"""The file of records: who may write it, and what a reader changes."""

from __future__ import annotations

import pytest

from seerattention.evals.records import RecordFile


def test_two_evaluations_do_not_write_to_one_folder(tmp_path) -> None:
    with RecordFile(tmp_path), pytest.raises(ValueError, match="another process is writing to"):
        RecordFile(tmp_path)
    with RecordFile(tmp_path) as file:
        assert file.records == {}
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose a folder that can be written"):
        RecordFile(tmp_path / "file" / "out")


def test_a_dry_reader_changes_nothing(tmp_path) -> None:
    (tmp_path / "samples.jsonl").write_text('{"torn')
    with RecordFile(tmp_path, readonly=True) as file:
        assert len(file.corrupt) == 1
    assert (tmp_path / "samples.jsonl").read_text() == '{"torn'
