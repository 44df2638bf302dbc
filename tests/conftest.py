"""What all tests share."""

import importlib
import os
import runpy
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Tests are small: threads that wait for each other on a busy machine cost more than they save.
torch.set_num_threads(1)
# Nothing is there: what was compiled for this machine would be chosen, here and by processes of tests.
os.environ["TORCH_HOME"] = str(Path(tempfile.gettempdir(), f"no-torch-{os.getpid()}"))
# Examples are drawn alike in every run.
settings.register_profile("default", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("default")

OPS = (
    "select_blocks",
    "summarise_blocks",
    "score_blocks",
    "block_sparse_attention",
    "dense_attention",
    "select_decode_blocks",
    "update_summaries",
    "block_sparse_decode",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let who has a quarter of an hour try everything."""
    parser.addoption("--every-kill", action="store_true", help="Kill commands before every file operation.")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def public():
    """A folder that other users see, which those of pytest are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def unreadable():
    """A context in which one may not open a file; root, who may open any, is nobody in it."""

    @contextmanager
    def closed(file: Path):
        mode, root = file.stat().st_mode, os.geteuid() == 0
        file.chmod(0)
        if root:
            os.seteuid(65534)
        try:
            yield
        finally:
            if root:
                os.seteuid(0)
            file.chmod(mode)

    return closed


@pytest.fixture
def full_disk():
    """A context in which no file becomes larger than so many bytes."""
    resource = pytest.importorskip("resource")

    @contextmanager
    def full(size: int):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return full


class Calls(Counter):
    """How often each op was called."""

    def taken(self) -> dict[str, int]:
        """Return the counts, and begin anew."""
        found = dict(self)
        self.clear()
        return found


@pytest.fixture
def ops(monkeypatch) -> Calls:
    """How often each op is called, wherever it was imported."""
    found = Calls()
    for name in OPS:
        own = getattr(importlib.import_module(f"seerattention.ops.{name}"), name)

        def counted(*args, own=own, name=name, **kwargs):
            found[name] += 1
            return own(*args, **kwargs)

        for module in [m for n, m in sys.modules.items() if n.startswith("seerattention")]:
            if vars(module).get(name) is own:
                monkeypatch.setattr(module, name, counted)
    return found


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Run a script in this process, where what it imports is there already, and return what it printed.

    Called with the script, or the name of a module of the repository, and its arguments; a script that ends
    in an error raises it, as an exit does.
    """

    def run(script: Path | str, *arguments: object) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
        try:
            if isinstance(script, str):
                # A fresh one, though a test file has imported it.
                monkeypatch.delitem(sys.modules, script, raising=False)
                runpy.run_module(script, run_name="__main__")
            else:
                monkeypatch.syspath_prepend(str(script.parent))
                runpy.run_path(str(script), run_name="__main__")
        finally:
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)
        return capsys.readouterr().out

    return run
