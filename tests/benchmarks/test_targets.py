"""A report of speeds is judged, and says so itself."""

import json
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "targets.py"


def row(tokens, backend, speedup, kind="backend"):
    where = {"tokens": tokens, "block": 64, "mask": "random", "kind": kind, "asked": 0.1}
    return where | {"backend": backend, "speedup": speedup}


def test_targets(run_script, tmp_path):
    rows = [
        row(32768, "triton", 4.0),
        row(32768, "hopper", 8.3),
        row(32768, "flex", 99.0, kind="peer"),
        row(131072, "hopper", 7.9),
    ]
    layer = {"tokens": 32768, "block": 64, "gate": "published", "backend": "hopper", "speedup": 1.0}
    layers = [layer | {"selection_ms": 0.36, "memory_mb": None}]
    path = tmp_path / "prefill.json"
    path.write_text(json.dumps({"rows": rows, "layers": layers}))
    printed = run_script(SCRIPT, path)
    report = json.loads(path.read_text())
    assert report["rows"] == rows
    found = {t["what"]: t for t in report["targets"]}
    assert len(found) == len(printed.splitlines()) == 17
    at_32k = found["32k, blocks of 64, random 10 %: speedup"]
    assert (at_32k["reached"], at_32k["met"], at_32k["backend"]) == (8.3, True, "hopper")
    assert found["128k, blocks of 64, random 10 %: speedup"]["met"] is False
    assert found["8k, blocks of 64, random 10 %: speedup"]["met"] is None
    assert found["32k, selection by the published gate: ms"]["met"] is False


def test_targets_of_decoding(run_script, tmp_path):
    step = {"batch": 1, "tokens": 131072, "kind": "step"}
    rows = [
        step | {"variant": "triton", "speedup": 6.2},
        step | {"variant": "with choosing, default", "speedup": 4.4},
    ]
    path = tmp_path / "decode.json"
    path.write_text(json.dumps({"rows": rows}))
    printed = run_script(SCRIPT, path)
    found = {t["what"]: t for t in json.loads(path.read_text())["targets"]}
    assert len(found) == len(printed.splitlines()) == 18
    assert found["1 x 128k: attention alone"]["met"]
    assert not found["1 x 128k: with choosing by keys' summaries"]["met"]
    assert found["64 x 128k: with choosing by keys' summaries"]["met"] is None
