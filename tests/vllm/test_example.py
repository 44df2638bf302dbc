"""The example runs as it is."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_vllm.py"


def test_the_example():
    assert EXAMPLE.name == "serve_vllm.py"
    out = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr[-3000:]
    assert len(re.findall(r"^[\d,]+ tokens, then: '.+'$", out.stdout, re.M)) == 2
    (read,) = re.findall(r"^([\d.]+)% of the blocks read$", out.stdout, re.M)
    assert 5 < float(read) < 30
