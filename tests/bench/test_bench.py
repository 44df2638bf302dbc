"""The benchmark's selections, counts, targets and crossovers, without timing anything."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from seerattention.bench import masks
from seerattention.bench.ceilings import l2_tflops
from seerattention.bench.crossover import entry_of, merged
from seerattention.bench.prefill import causal_pairs, check_rows
from seerattention.bench.targets import TARGETS, judge
from seerattention.ops.block_sparse_attention import block_sparse_attention
from seerattention.ops.block_sparse_attention.reference import token_mask
from seerattention.ops.shapes import Shape
from seerattention.policies import TopK
from seerattention.selection import causal_blocks
from seerattention.testing.inputs import random_qkv, random_selection

ROOT = Path(__file__).parents[2]


def shape(tokens, block=16, heads=4, kv_heads=2):
    return Shape(
        name="",
        heads=heads,
        kv_heads=kv_heads,
        queries=tokens,
        keys=tokens,
        head_dim=16,
        block_size=(block, block),
    )


@pytest.mark.parametrize("mask", masks.MASKS)
@pytest.mark.parametrize("tokens", [16 * 64, 16 * 64 - 5])
def test_masks_have_the_density_asked_for(mask, tokens):
    sizes = shape(tokens)
    scores = torch.randn(3, 3, 24, 24)
    made = {
        "random": lambda: masks.random(sizes, 0.2, "cpu"),
        "band": lambda: masks.band(sizes, 0.2, "cpu"),
        "gate": lambda: masks.gate(sizes, 0.2, "cpu", scores),
    }[mask]()
    assert made.shape == (1, 4, 64, 64)
    valid = causal_blocks(tokens, tokens, (16, 16))
    if mask == "random":
        # Own and first block come on top: two of on average 32.
        assert 0.2 - 1 / 64 <= made.density(valid) <= 0.2 + 2 / 32
    else:
        assert made.density(valid) == pytest.approx(TopK(0.2).expected_density(64, 16), rel=1e-12)
    chosen = made.to_mask()
    assert not (chosen & ~valid).any()
    assert chosen[..., 0].all()
    assert chosen.diagonal(dim1=-2, dim2=-1).all()


def test_full_mask():
    assert torch.equal(masks.full(shape(100), "cpu").to_mask()[0, 3], causal_blocks(100, 100, (16, 16)))


def test_heads_of_a_group_stay_together():
    # The teacher: 8 layers of 2 groups of 3 heads. Wanted: 8 groups of 4.
    picked = masks.pick_heads(16, 3, 8, 4)
    assert len(set(picked)) == 32
    for group in range(8):
        own, other = 2 * group, 2 * group + 1
        assert picked[4 * group : 4 * group + 4] == [(own, 0), (own, 1), (own, 2), (other, 0)]
    assert len(masks.pick_heads(2, 3, 4, 2)) == 8


def test_a_longer_layout_keeps_what_is_near_and_the_first_block():
    known, blocks = 16, 100
    scores = torch.randn(known, known)
    longer = masks.lay_out(scores, blocks, seed=0)
    assert longer.shape == (blocks, blocks)
    assert torch.equal(longer[:known, :known].tril(), scores.tril())
    for row in range(known, blocks):
        source = known // 2 + (row - known) % (known // 2)
        assert longer[row, 0] == scores[source, 0]
        for distance in range(known // 2):
            assert longer[row, row - distance] == scores[source, source - distance]
    assert longer.isfinite().all()
    # Far passages repeat a row's early keys up to one amount per passage.
    period = known // 2 - 1
    first, second = longer[90, 1 : 1 + period], longer[90, 1 + period : 1 + 2 * period]
    early = scores[known // 2 + (90 - known) % 8, 1 : 1 + period]
    for repeated in (first, second):
        assert torch.allclose(repeated - repeated[0], early - early[0], atol=1e-5)
    assert first[0] != second[0]
    assert torch.equal(masks.lay_out(scores, 5, seed=0), scores[:5, :5])


def test_larger_blocks_take_their_best_part():
    scores = torch.arange(16.0).view(1, 1, 4, 4)
    coarse = masks._coarser(scores, 2)
    # Acausal parts do not count: row 1, column 1 holds 15 but row 0 column 0 only 0, 4 and 5.
    assert coarse[0, 0, 0, 0] == 5
    assert coarse[0, 0, 1].tolist() == [13, 15]


@pytest.mark.parametrize("tokens", [1, 16, 17, 100])
def test_pairs_are_counted_exactly(tokens):
    sizes = shape(tokens)
    selection = random_selection(sizes, density=0.4)
    expected = int(token_mask(selection, 4, tokens, tokens).sum())
    assert causal_pairs(selection, tokens) == expected


def test_sampled_rows_are_held_to_the_budget():
    sizes = shape(200)
    qkv, selection = random_qkv(sizes), random_selection(sizes, density=0.4)
    out = block_sparse_attention(*qkv, selection, backend="gather")
    check_rows(qkv, selection, out)
    for token in (3, 100, 199):
        wrong = out.clone()
        wrong[0, 1, token] *= 1.01
        with pytest.raises(AssertionError, match="exceeds the budget"):
            check_rows(qkv, selection, wrong)


def test_the_l2_line():
    # 64 queries share a read: 64 FLOP per byte of bf16 (docs/kernels.md).
    assert l2_tflops(6.25, 64, 2) == 400
    assert l2_tflops(6.25, 128, 2) == 800
    assert l2_tflops(6.25, 64, 4) == 200


def attention_row(tokens, backend, asked, ms, kind="backend", mask="random", density=None, **more):
    density = asked if density is None else density
    row = {"tokens": tokens, "block": 64, "mask": mask, "kind": kind, "backend": backend, "asked": asked}
    return row | {"density": density, "ms": ms, "first_ms": 1.0, "speedup": 1.0} | more


def test_targets():
    rows = [
        attention_row(32768, "triton", 0.1, 1.0, speedup=4.0),
        attention_row(32768, "hopper", 0.1, 1.0, speedup=7.6),
        attention_row(32768, "flex", 0.1, 1.0, kind="peer", speedup=99.0),
        attention_row(131072, "hopper", 0.1, 1.0, speedup=7.9),
    ]
    layer = {"tokens": 32768, "block": 64, "gate": "published", "backend": "hopper", "speedup": 1.0}
    layers = [layer | {"selection_ms": 0.36, "memory_mb": None}]
    found = {t["what"]: t for t in judge({"rows": rows, "layers": layers})}
    assert len(found) == len(TARGETS)
    at_32k = found["32k, blocks of 64, random 10 %: speedup"]
    assert (at_32k["reached"], at_32k["met"], at_32k["backend"]) == (7.6, True, "hopper")
    assert found["128k, blocks of 64, random 10 %: speedup"]["met"] is False
    assert found["8k, blocks of 64, random 10 %: speedup"]["met"] is None
    assert found["32k, selection by the published gate: ms"]["met"] is False
    json.dumps(list(found.values()))


def prefill_report():
    rows, layers = [], []
    # tokens: dense ms, selection ms, ms at 10, 30 and 100 %.
    times = {1024: (1, 1, 0.2, 0.5, 1), 2048: (4, 1, 0.5, 1.5, 5), 4096: (16, 1, 1, 3, 10)}
    for tokens, (dense, selection, *sparse) in times.items():
        rows.append(attention_row(tokens, "dense cudnn", 1.0, dense, "dense", "full", first_ms=50.0))
        rows.append(attention_row(tokens, "dense fa2", 1.0, 2 * dense, "dense", "full"))
        for asked, ms in zip((0.1, 0.3, 1.0), sparse, strict=True):
            mask = "full" if asked == 1 else "random"
            rows.append(attention_row(tokens, "gather", asked, ms, mask=mask))
            rows.append(attention_row(tokens, "flex", asked, ms / 2, mask=mask))
        layers.append({"tokens": tokens, "block": 64, "gate": "default", "selection_ms": selection})
    return {
        "device_type": "cuda",
        "capability": "9.0",
        "versions": {"device": "Some GPU"},
        "date": "2026-01-01",
        "dtype": "bfloat16",
        "shape": {},
        "rows": rows,
        "layers": layers,
    }


def test_crossover_from_a_report(monkeypatch):
    monkeypatch.setattr("seerattention.bench.crossover.ORDER", ("gather",))
    entry = entry_of(prefill_report(), "default", 64)
    assert entry["backend"] == "gather"
    assert entry["dense_below"] == 2048
    # 1k: nothing is left after selecting. 2k: 3 ms lie between 1.5 at 30 % and 5 at 100 %. 4k: always.
    assert [row["densest"] for row in entry["rows"]] == [0, 0.6, 1]
    # cuDNN saves 1, 4 and 16 ms a layer; its first call took 50, so 32 layers pay from 2k on.
    assert entry["cudnn_from"] == 2048
    with pytest.raises(ValueError, match="has no selection of gate 'sub16'"):
        entry_of(prefill_report(), "sub16", 64)


def test_crossover_takes_what_auto_takes(monkeypatch):
    monkeypatch.setattr("seerattention.bench.crossover.ORDER", ("not measured",))
    assert entry_of(prefill_report(), "default", 64)["backend"] == "flex"


def test_an_entry_replaces_its_device_and_guesses():
    def one(device_type, device, below=0):
        return {"device_type": device_type, "device": device, "dense_below": below}

    table = [one("cpu", "A"), one("cuda", None), one("cuda", "B"), one("cuda", "C", 1)]
    assert merged(table, one("cuda", "C", 2)) == [one("cpu", "A"), one("cuda", "B"), one("cuda", "C", 2)]


def test_a_dense_kernel_that_cannot_run_says_so():
    from torch.nn.attention import SDPBackend

    from seerattention.bench.peers import _sdpa

    qkv = random_qkv(shape(32))
    with pytest.raises(NotImplementedError, match="CUDNN_ATTENTION cannot run"):
        _sdpa(SDPBackend.CUDNN_ATTENTION, *qkv, random_selection(shape(32), density=1.0))


def test_teacher_scores():
    scores = masks.teacher_scores("cpu", 256)
    assert scores.shape == (16, 3, 4, 4)
    selection = masks.gate(shape(64 * 40, 64, heads=32, kv_heads=8), 0.2, "cpu", scores.repeat(1, 1, 3, 3))
    assert selection.shape == (1, 32, 40, 40)
    assert int(selection.counts.max()) == TopK(0.2).blocks(40)


def test_end_to_end_runs_on_a_tiny_model(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("end_to_end", ROOT / "benchmarks" / "end_to_end.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path / "e.json"
    options = ["--shape", "tiny", "--tokens", "300", "--repeats", "1", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["end_to_end.py", *options])
    module.main()
    report = json.loads(out.read_text())
    assert [row["method"] for row in report["rows"]] == ["dense", "published", "default"]
    for row in report["rows"]:
        assert all(row["parts_s"][part] > 0 for part in ("attention", "mlp", "projections"))
        assert (row["parts_s"]["selection"] > 0) == (row["method"] != "dense")
    assert "published" in capsys.readouterr().out
