"""Files that appear whole or not at all."""

import os

import pytest

from seerattention.files import atomic_folder, staged, write_whole


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
