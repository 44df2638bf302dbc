"""The benchmark on a CUDA device, small: events, peers, memory, ceilings; cuDNN for dense attention."""

import json

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from seerattention import cli
from seerattention.bench.ceilings import ceilings
from seerattention.measure.timing import interleaved
from seerattention.ops.dense_attention import cudnn_first

pytestmark = pytest.mark.gpu


def test_prefill_report(tmp_path):
    out = tmp_path / "prefill.json"
    options = (
        "--tokens 1024 --density 0.2 --density 1 --mask random --mask gate --teacher-tokens 1024 --repeats 2 "
        "--page 64"
    )
    arguments = ["bench", "prefill", "--out", str(out), "--device", "cuda", "--peers", "cudnn,fa2"]
    result = CliRunner().invoke(cli.app(), [*arguments, *options.split()])
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert {"dense cudnn", "dense fa2", "triton, pages of 64"} <= {r["backend"] for r in report["rows"]}
    assert all(row["memory_mb"] > 0 for row in report["layers"])
    assert all(value > 0 for value in report["ceilings"].values())


def test_a_step_of_decoding_waits_for_nothing(tmp_path):
    out = tmp_path / "decode.json"
    options = "--size 2x4096 --size 1x8192 --page 128 --repeats 2 --device cuda"
    result = CliRunner().invoke(cli.app(), ["bench", "decode", "--out", str(out), *options.split()])
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    # Every part was captured in a CUDA graph, and every output is in the error budget.
    assert report["notes"] == []
    names = {r["variant"] for r in report["rows"]}
    assert {"dense cudnn", "dense fa2", "triton", "triton, pages of 128", "with choosing, quest"} <= names


def test_ceilings_are_plausible():
    limits = ceilings("cuda", torch.bfloat16)
    # The L2 cache is faster than the memory behind it.
    assert limits["l2_tbs"] > limits["copy_tbs"] / 2


def test_events_time_what_runs():
    small, large = (torch.randn(n, n, device="cuda") for n in (256, 4096))
    seconds = interleaved({"small": lambda: small @ small, "large": lambda: large @ large}, device="cuda")
    assert max(seconds["small"]) < min(seconds["large"])


@pytest.mark.parametrize("compiled", [False, True])
def test_cudnn_first(compiled):
    q, k, v = (torch.randn(1, h, 1000, 64, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
    run = torch.compile(cudnn_first) if compiled else cudnn_first
    expected = F.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), is_causal=True, enable_gqa=True
    )
    error = (run(q, k, v, scale=64**-0.5).float() - expected).abs().max()
    assert error < 0.05
