"""What all tests share."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Tests are small: threads that wait for each other on a busy machine cost more than they save.
torch.set_num_threads(1)
# Examples are drawn alike in every run.
settings.register_profile("default", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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
