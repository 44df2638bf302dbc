"""Commands that were killed can be finished, with the result they would have had; two never mix."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kills.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
def test_commands_killed_before_any_operation_on_files_end_alike_and_a_second_is_refused(
    base, text, tmp_path, pytestconfig
):
    """One kill of each command, drawn with a fixed seed; all of them with ``--every-kill``."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [
        sys.executable,
        str(SCRIPT),
        str(base),
        str(text),
        str(tmp_path),
        "0" if pytestconfig.getoption("every_kill") else "1",
    ]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("operations on files") == 8
