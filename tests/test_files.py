"""Files that appear whole or not at all."""

import os

import pytest
import torch
from safetensors.torch import save_file

from seerattention.files import (
    atomic_folder,
    check_readable,
    json_lines,
    read_json,
    read_text,
    staged,
    write_json,
    write_whole,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(folder, text):
    with staged(folder) as temporary:
        (temporary / "a").write_text(text)
        (temporary / "b").write_text(text)


def replace(folder, text):
    with atomic_folder(folder) as temporary:
        (temporary / "a").write_text(text)


def test_what_fails_leaves_what_was_there(tmp_path):
    folder = tmp_path / "folder"
    write(folder, "old")

    def half(path):
        path.write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_whole(folder / "a", half)
    for way in (staged, atomic_folder):
        with pytest.raises(OSError, match="No space left"), way(folder) as temporary:
            half(temporary / "a")
    assert names(tmp_path) == ["folder"]
    assert names(folder) == ["a", "b"]
    assert (folder / "a").read_text() == "old"


def test_a_folder_is_replaced_and_files_are_added(tmp_path):
    replace(tmp_path / "folder", "one")
    write(tmp_path / "folder", "two")
    assert names(tmp_path / "folder") == ["a", "b"]
    replace(tmp_path / "folder", "three")
    assert names(tmp_path / "folder") == ["a"]
    assert names(tmp_path) == ["folder"]


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda number: flushed.append(names(tmp_path / "folder")))
    (tmp_path / "folder").mkdir()
    write_whole(tmp_path / "folder" / "c", lambda path: path.write_text(""))
    write(tmp_path / "folder", "new")
    replace(tmp_path / "folder", "other")
    assert len(flushed) == 4
    assert flushed[0] == [".c"]
    assert [n for n in flushed[1] if not n.startswith(".writing")] == ["c"]
    assert flushed[3] == ["a", "b", "c"]


def test_a_folder_that_cannot_be_made_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    for way in (staged, atomic_folder):
        with (
            pytest.raises(OSError, match="choose a folder that can be written"),
            way(tmp_path / "file" / "x"),
        ):
            pytest.fail("work was done")


def save(path):
    save_file({"a": torch.zeros(10_000)}, path)


def test_a_full_disk_is_an_error_of_the_system_and_changes_nothing(tmp_path, full_disk):
    folder = tmp_path / "folder"
    write(folder, "old")

    def one():
        write_whole(folder / "a", save)

    def together():
        with staged(folder) as temporary:
            save(temporary / "a")

    def all_of_it():
        with atomic_folder(folder) as temporary:
            save(temporary / "a")

    for way in (one, together, all_of_it):
        with full_disk(20_000), pytest.raises(OSError, match=r"cannot write .*folder.*; free some space"):
            way()
    assert names(tmp_path) == ["folder"]
    assert names(folder) == ["a", "b"]
    assert (folder / "a").read_text() == "old"


def test_what_is_written_is_as_readable_as_other_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "a", save)
        with staged(tmp_path) as temporary:
            save(temporary / "b")
        with atomic_folder(tmp_path / "folder") as temporary:
            save(temporary / "c")
        write_json(tmp_path / "d", 1)
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"a": 0o640, "b": 0o640, "c": 0o640, "d": 0o640, "folder": 0o750}


def test_what_may_not_be_read_is_not_called_missing(public, unreadable):
    (public / "a").write_text("1")
    with unreadable(public / "a"):
        for way in (check_readable, read_text, read_json, lambda path: list(json_lines(path))):
            with pytest.raises(PermissionError, match=r"denied.*/a"):
                way(public / "a")


@pytest.mark.parametrize("content", [b"{", b"", b"[" * 10**5, b"1" * 10**4, b"\xff\xff", b'"\x80"'])
def test_json_that_cannot_be_read_is_refused_by_its_place(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match="/a is no JSON that can be read"):
        read_json(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"1\n" + content + b"\n")
    with pytest.raises(ValueError, match="/b, line 2 is no JSON that can be read"):
        list(json_lines(tmp_path / "b"))
