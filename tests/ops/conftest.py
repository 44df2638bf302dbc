"""What the tests of compiled kernels share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from seerattention.ops import native


def why_not_here() -> str:
    """Say why kernels cannot be compiled here, if they cannot."""
    try:
        native.level()
    except NotImplementedError as error:
        return str(error)
    return "" if shutil.which("g++") or shutil.which("clang++") else "there is no C++ compiler"


SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1".split()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("torch") / "hub"


@pytest.fixture(params=native.LEVELS)
def level(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A kind of CPU that this one can be, for which the kernels are compiled; other tests do without them."""
    if reason := why_not_here():
        pytest.skip(reason)
    if not native._cpu().issuperset(native.LEVELS[request.param].split()):
        pytest.skip(f"this CPU has no {request.param}")
    with monkeypatch.context() as patch:
        patch.setattr(native, "level", lambda: request.param)
        before = torch.hub.get_dir()
        torch.hub.set_dir(folder)
        native.build()
        yield request.param
        torch.hub.set_dir(before)


@pytest.fixture(params=native.LEVELS, scope="session")
def sanitized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Each kind of CPU that this one can be, with kernels that stop at reads and writes out of bounds."""
    if not native._cpu().issuperset(native.LEVELS[request.param].split()):
        pytest.skip(f"this CPU has no {request.param}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "level", lambda: request.param)
        patch.setattr(native, "FLAGS", (*native.FLAGS, *SANITIZE))
        before = torch.hub.get_dir()
        torch.hub.set_dir(tmp_path_factory.mktemp("torch") / "hub")
        native.build()
        yield
        torch.hub.set_dir(before)
