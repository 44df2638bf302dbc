"""Every example runs, on the bundled model, and does what it says."""

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch

from seerattention.hosts.transformers import load_gates
from seerattention.measure.bundled import GATES, TEACHER, TEXT

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(run_script):
    """Run an example to its end and return what it printed."""
    return lambda name, *arguments: run_script(EXAMPLES / name, *arguments)


def published_folder(folder):
    """Gates for the bundled model in the published layout; the projections pass the mean."""
    config = json.loads((TEACHER / "config.json").read_text())
    settings = {
        "base_model": "someone/teacher",
        "seerattn_gate_type": "Qavg_Kmaxminavg",
        "seerattn_gate_block_size": 64,
        "seerattn_gate_hidden_size": 64,
        "seerattn_gate_force_double": False,
        "seerattn_sparsity_method": "nz_ratio",
        "seerattn_nz_ratio": 0.3,
        "seerattn_last_block_dense": True,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | settings))
    mean = torch.cat([torch.zeros(128, 64), torch.eye(64)]).expand(6, -1, -1).clone()
    key = "model.layers.{}.self_attn.attn_gate.mask_linear_k.weight"
    torch.save({key.format(i): mean for i in range(8)}, folder / "attn_gate_weights.pth")
    return folder


def test_published_gates(run, tmp_path):
    gates = published_folder(tmp_path / "gates")
    out = run("published_gates.py", TEACHER, gates, TEXT, "--tokens", 2048, "--new-tokens", 3)
    read = re.search(r"2048 tokens, policy top_k:0.3,dense_last_rows=2, ([\d.]+)% of the blocks read", out)
    assert 25 < float(read[1]) < 50
    assert re.search(r"^ +8 sparse$", out, re.M)
    assert re.search(r"^ +16 dense: decoding step$", out, re.M)


def test_own_gates(run, tmp_path):
    out = run("own_gates.py", "--steps", 40, "--length", 512, "--out", tmp_path / "gates")
    losses = [float(x) for x in re.findall(r"^step \d+: loss ([\d.]+)", out, re.M)]
    assert len(losses) == 40
    assert sum(losses[-10:]) < sum(losses[:10])
    dense, sparse = map(float, re.search(r"dense ([\d.]+), .* ([\d.]+)$", out, re.M).groups())
    assert 20 < dense < sparse < 100
    assert load_gates(tmp_path / "gates").policy == "top_k:0.1,sink_blocks=1"


def test_compare_policies(run):
    out = run("compare_policies.py", "--tokens", 1024)
    rows = re.findall(r"^(\w+) (\S*) +density +([\d.]+)%  recall +([\d.]+)%  perplexity ([\d.]+)$", out, re.M)
    assert [name for name, *_ in rows] == ["dense"] + ["gates"] * 4 + ["quest"] * 2
    density, recall, perplexity = ([float(row[i]) for row in rows] for i in (2, 3, 4))
    assert density[0] == recall[0] == 100
    assert all(d < 100 for d in density[1:])
    assert all(perplexity[0] - 0.5 < p < 100 for p in perplexity[1:])


def test_chunked_prefill(run):
    out = run("chunked_prefill.py", "--tokens", 1100, "--piece", 256)
    assert "1100 tokens cached" in out
    assert len(re.findall(r"\.\.\.'.+'$", out, re.M)) == 2
    # Four pieces of 256 and one of 76 tokens, and what follows the cut but for the block that it was in.
    assert re.search(r"^ +48 layers sparse$", out, re.M)


def test_serve():
    with subprocess.Popen(
        [sys.executable, str(EXAMPLES / "serve.py"), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            address = server.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:"), server.stderr.read()
            # Long enough to be sparse on any CPU that was measured.
            prompt = TEXT.read_text()[:18000].encode()
            with urllib.request.urlopen(f"{address}?new_tokens=4", prompt) as answer:
                assert answer.read().decode().strip()
            with urllib.request.urlopen(address) as answer:
                assert "8 sparse" in answer.read().decode()
        finally:
            server.kill()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_examples_are_short_and_tested(path):
    assert len(path.read_text().splitlines()) <= 60
    tests = Path(__file__).parents[1]
    found = [*tests.glob("examples/test_*.py"), *tests.glob("vllm/test_*.py")]
    assert any(f'"{path.name}"' in test.read_text() for test in found)


def test_the_bundled_gates_are_those_of_the_bundled_model():
    assert load_gates(GATES).base.name == "seerattention/teacher"


def test_decode(run):
    out = run("decode.py", "--tokens", 2048, "--budget", 512)
    number = re.search(r"the number asked for is (\d{5})", out)[1]
    assert f"dense: {number}\n" in out
    assert f"sparse: {number}\n" in out
    assert re.search(r"^ +32 layers sparse: decoding step$", out, re.M)
