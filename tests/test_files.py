"""Files and folders that appear whole or not at all, and one process that writes them."""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from seerattention import files
from seerattention.files import (
    atomic_folder,
    check_readable,
    check_writable,
    json_lines,
    locked,
    read_json,
    read_text,
    write_json,
    write_whole,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def replace(folder, text):
    with atomic_folder(folder) as temporary:
        (temporary / "a").write_text(text)


def test_what_fails_leaves_what_was_there(tmp_path):
    folder = tmp_path / "folder"
    replace(folder, "old")

    def half(path):
        path.write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_whole(folder / "a", half)
    with pytest.raises(OSError, match="No space left"), atomic_folder(folder) as temporary:
        half(temporary / "a")
    with pytest.raises(OSError, match="No space left"), locked(tmp_path / "made"):
        half(tmp_path / "file")
    assert names(tmp_path) == ["file", "folder"]
    assert names(folder) == ["a"]
    assert (folder / "a").read_text() == "old"


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_replaced_as_a_whole(tmp_path, monkeypatch, exchanges):
    replace(tmp_path / "folder", "old")
    if exchanges:
        # No moment without a folder of that name.
        monkeypatch.setattr(Path, "replace", lambda *paths: pytest.fail("moved away"))
    else:
        monkeypatch.setattr(files.ctypes, "CDLL", lambda name: None)
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "b").write_text("new")
    assert names(tmp_path / "folder") == ["b"]
    assert names(tmp_path) == ["folder"]


def test_where_names_cannot_be_exchanged_a_kill_between_two_renames_loses_nothing(tmp_path, monkeypatch):
    replace(tmp_path / "folder", "old")
    beside = tmp_path / ".writing-folder"
    beside.mkdir()
    (tmp_path / "folder").rename(beside / "old")
    (beside / ".writing").write_text("")
    with pytest.raises(KeyError), atomic_folder(tmp_path / "folder"):
        raise KeyError
    assert (tmp_path / "folder" / "a").read_text() == "old"
    assert names(tmp_path) == ["folder"]


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda number: flushed.append(names(tmp_path)))
    write_whole(tmp_path / "c", lambda path: path.write_text(""))
    replace(tmp_path / "folder", "other")
    assert flushed == [[".writing-c"], [".writing-folder", "c"]]


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    (tmp_path / ".writing-gates" / "new").mkdir(parents=True)
    (tmp_path / ".writing-gates" / "new" / "half").write_text("half")
    for name in (".writing", ".writing-file", ".writing-other"):
        (tmp_path / name).write_text("half")
    write_whole(tmp_path / "file", lambda path: path.write_text("whole"))
    replace(tmp_path / "gates", "new")
    assert names(tmp_path) == [".writing", ".writing-other", "file", "gates"]
    assert names(tmp_path / "gates") == ["a"]
    with locked(tmp_path):
        assert names(tmp_path) == [".writing", "file", "gates"]
    assert names(tmp_path) == ["file", "gates"]


OTHER = """
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from seerattention.files import atomic_folder, locked
with locked(sys.argv[1]), atomic_folder(sys.argv[2]):
    print("in", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_ends_or_is_killed(tmp_path):
    folder, target = tmp_path / "folder", tmp_path / "gates"
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, folder, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        for way, where in ((locked, folder), (atomic_folder, target)):
            with (
                pytest.raises(ValueError, match=r"another process is writing to .*; wait for it"),
                way(where),
            ):
                pytest.fail("two at once")
        assert names(tmp_path) == [".writing-gates", "folder"]
        assert names(folder) == [".writing"]
        other.kill()
    with locked(folder), locked(folder, again=True), atomic_folder(target):
        with pytest.raises(ValueError, match="another process"), locked(folder):
            pass
        assert names(folder) == [".writing"]
    assert names(tmp_path) == ["folder", "gates"]
    assert names(folder) == []


def test_a_lock_whose_last_owner_removes_it_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    free, removed = files._free, []

    def late(descriptor, wait):
        if not removed:
            removed.append(shutil.rmtree(tmp_path / "folder"))
        return free(descriptor, wait)

    monkeypatch.setattr(files, "_free", late)
    with locked(tmp_path / "folder"):
        assert names(tmp_path / "folder") == [".writing"]
    assert names(tmp_path) == []


def test_who_waits_for_a_lock_gets_it_when_it_is_free(tmp_path):
    inside = []

    def work(_):
        with locked(tmp_path, wait=True):
            inside.append(1)
            time.sleep(0.02)
            assert inside == [1]
            inside.clear()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(8))) == [None] * 8
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_written_is_refused_and_nothing_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    for way in (locked, atomic_folder):
        for place in (tmp_path / "file" / "x", tmp_path / "file", "/dev/null"):
            with pytest.raises(OSError, match="choose a folder that can be written"), way(place):
                pytest.fail("work was done")
    for place in (tmp_path / "file" / "x", tmp_path, "/dev/null"):
        with pytest.raises(OSError, match="choose a folder that can be written"):
            write_json(place, {})
    assert check_writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_what_a_link_leads_to_is_written(tmp_path):
    (tmp_path / "far").mkdir()
    for name in ("file", "folder"):
        (tmp_path / name).symlink_to(tmp_path / "far" / name)
    for _ in range(2):
        write_json(tmp_path / "file", [1])
        replace(tmp_path / "folder", "new")
    assert (tmp_path / "far" / "file").read_text() == "[\n  1\n]\n"
    assert names(tmp_path / "far" / "folder") == ["a"]
    assert (tmp_path / "file").is_symlink()
    assert (tmp_path / "folder").is_symlink()


def save(path):
    save_file({"a": torch.zeros(10_000)}, path)


def test_a_full_disk_is_an_error_of_the_system_and_changes_nothing(tmp_path, full_disk):
    folder = tmp_path / "folder"
    replace(folder, "old")

    def one():
        write_whole(folder / "a", save)

    def all_of_it():
        with atomic_folder(folder) as temporary:
            save(temporary / "a")

    for way in (one, all_of_it):
        with full_disk(20_000), pytest.raises(OSError, match=r"cannot write .*folder.*; free some space"):
            way()
    assert names(tmp_path) == ["folder"]
    assert names(folder) == ["a"]
    assert (folder / "a").read_text() == "old"


def test_what_is_written_is_as_readable_as_other_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "a", save)
        with atomic_folder(tmp_path / "folder") as temporary:
            save(temporary / "c")
        write_json(tmp_path / "d", 1)
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"a": 0o640, "c": 0o640, "d": 0o640, "folder": 0o750}


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
    (tmp_path / "b").write_bytes(b"1\n\n" + (content or b"?") + b"\n")
    with pytest.raises(ValueError, match="/b, line 3 is no JSON that can be read"):
        list(json_lines(tmp_path / "b"))


def test_blank_lines_of_json_lines_are_none(tmp_path):
    (tmp_path / "a").write_bytes(b"\n1\r\n\r\n \n2\n\n")
    assert list(json_lines(tmp_path / "a")) == [(f"{tmp_path}/a, line {n}", v) for n, v in ((2, 1), (5, 2))]
