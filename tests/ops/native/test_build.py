"""How the CPU's kernels are compiled, and where that cannot be done."""

from __future__ import annotations

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from seerattention.ops import native


def test_two_build_at_once(level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.hub.set_dir(tmp_path / "hub")
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-O0"))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: native.build(), range(2))
    assert first == second == native.library(level)
    # Nothing else is left, and there is nothing to do a second time.
    assert list(first.parent.iterdir()) == [first]
    made = first.stat().st_mtime_ns
    assert native.build().stat().st_mtime_ns == made


def test_machines_without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(native.platform, "system", lambda: "Linux")
    assert native.missing() == "its code is for x86-64 on Linux, not for aarch64 on Linux"
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(native, "_cpu", lambda: frozenset({"sse2", "avx"}))
    assert native.missing() == "its code needs a CPU with AVX2, FMA and F16C"
    with pytest.raises(NotImplementedError, match="its code needs a CPU with AVX2"):
        native.build()
    for name, needs in native.LEVELS.items():
        monkeypatch.setattr(native, "_cpu", lambda needs=needs: frozenset({*needs.split(), "sse2"}))
        assert native.level() == name


def test_builds_that_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "level", lambda: "avx2")
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path / "hub")
    try:
        for tool, said in (
            ("echo native.cpp: error: unknown >&2; exit 1", "cannot compile .*: native.cpp: error: unknown"),
            ("echo killed >&2; exit 1", "cannot compile the CPU's kernels: killed"),
            ("kill -9 $$", "cannot compile the CPU's kernels: it ended by -9 without a word"),
            ("printf 'an error: \\377' >&2; exit 1", "cannot compile the CPU's kernels: an error: \ufffd"),
            # The linker's reason, not the compiler's that the linker failed; nor a warning.
            (
                "echo 'ld: warning: old' >&2; echo '/bin/ld: cannot find -lomp' >&2; "
                "echo 'clang: error: linker command failed' >&2; exit 1",
                "cannot compile the CPU's kernels: /bin/ld: cannot find -lomp$",
            ),
            # In English, wherever its user lives.
            ('test "$LC_ALL" = C || echo Fehler >&2; echo an error >&2; exit 1', "kernels: an error$"),
        ):
            compiler = tmp_path / "g++"
            compiler.write_text(f"#!/bin/sh\n{tool}\n")
            compiler.chmod(0o755)
            monkeypatch.setenv("PATH", str(tmp_path))
            with pytest.raises(NotImplementedError, match=said):
                native.build()
        # A library that cannot be loaded is none, and not kept.
        compiler.write_text('#!/bin/sh\nfor last; do :; done\necho nothing > "$last"\n')
        with pytest.raises(OSError, match=r"file too short|invalid ELF header"):
            native.build()
        # What a killed build left goes with the next one.
        left = native.library("avx2").parent / ".writing-left"
        left.mkdir(parents=True)
        with pytest.raises(OSError, match="file too short"):
            native.build()
        assert not left.exists()
        compiler.unlink()
        with pytest.raises(NotImplementedError, match=r"a C\+\+ compiler is needed, g\+\+ or clang\+\+"):
            native.build()
        assert not list(native.library("avx2").parent.iterdir())
        torch.hub.set_dir(tmp_path / "file" / "hub")
        (tmp_path / "file").touch()
        compiler.touch(0o755)
        with pytest.raises(OSError, match=r"file is not a folder\); choose a folder .*, by TORCH_HOME"):
            native.build()
    finally:
        torch.hub.set_dir(before)


def test_damaged_libraries_are_not_loaded_and_built_anew(
    level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = native.library(level).read_bytes()
    torch.hub.set_dir(tmp_path / "hub")
    to = native.library(level)
    to.parent.mkdir()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    for damaged in (b"", b"damaged", whole[:50_000], whole[:-100], bytes(changed)):
        to.write_bytes(damaged)
        assert native.missing() == f"{to} is damaged; `seerattention build` compiles it anew"
    # Not damaged, but for a system that this one is not.
    to.write_bytes(b"elsewhere" + hashlib.sha256(b"elsewhere").digest())
    assert re.search("file too short; `seerattention build` compiles it anew", native.missing() or "")
    monkeypatch.setattr(native, "_compiled", lambda _, made: (made.write_bytes(whole[:-32]), made)[1])
    assert native.build() == to
    assert to.read_bytes() == whole
    assert native.missing() is None


def test_sources_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = native.library("avx2")
    monkeypatch.setattr(native, "SOURCES", Path("nowhere"))
    assert native.library("avx2") == first
