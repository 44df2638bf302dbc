"""Cheaper ways to choose: what they must equal where they leave nothing out, and a run that shows it."""

import math

import numpy as np
import pytest
import torch

from experiments.approximate import run as experiment
from experiments.approximate.table import relative, table
from experiments.approximate.ways import (
    TILE,
    Layer,
    averaged,
    bounded,
    coarse,
    exact,
    in_fp8,
    in_fp16,
    keeping,
    totals_of_means,
    totals_of_some,
    ways,
)
from experiments.variants import POLICY
from seerattention.files import read_json
from seerattention.measure import bundled
from seerattention.measure.compare import measured
from seerattention.ops.score_blocks import score_blocks
from seerattention.policies import parse

MODULE = "experiments.approximate.run"


@pytest.fixture(params=[600, 1024], ids=["short last block", "whole blocks"])
def layer(request):
    """A layer of two query heads, whose keys come in groups, 4 tokens per summary and 64 per block."""
    torch.manual_seed(0)
    tokens, summaries = request.param, -(-request.param // 4)
    queries, keys = (torch.randn(2, summaries, 32) for _ in range(2))
    whole = [torch.cat([x, x[:, -1:].expand(-1, -summaries % 16, -1)], 1) for x in (queries, keys)]
    made = Layer(*whole, (16, 16), 32**-0.5, tokens, (64, 64))
    options = {"scale": made.scale, "rows": made.rows, "shares": True, "backend": "reference"}
    return made, score_blocks(queries[None], keys[None], (16, 16), **options)[0]


def seen(layer, scores):
    """Scores of valid pairs."""
    return scores[:, layer.valid]


def test_the_exact_way_is_the_specification(layer):
    layer, wanted = layer
    scores, products = exact(layer)
    torch.testing.assert_close(seen(layer, scores), seen(layer, wanted))
    assert products == 1


def test_ways_that_leave_nothing_out_are_exact(layer):
    layer, wanted = layer
    for together in (False, True):
        scores, products = coarse(layer, 4, 1, 1.0, together=together)
        torch.testing.assert_close(seen(layer, scores), seen(layer, wanted))
        assert products == 1 + 1 / 4
    for made in (totals_of_some(layer, 1), totals_of_means(layer, 1)):
        torch.testing.assert_close(seen(layer, made.scores), seen(layer, wanted))


def test_no_score_exceeds_its_bound(layer):
    layer, _ = layer
    scores = layer.shares(layer.exact, layer.totals)
    earlier = layer.valid & ~layer.always
    loose, tight, none = (bounded(layer, parts)[:, earlier] for parts in (1, 4, 16))
    assert (loose >= scores[:, earlier] - 1e-5).all()
    assert (tight >= scores[:, earlier] - 1e-5).all()
    assert tight.mean() < loose.mean()
    # A part of one summary has no radius.
    torch.testing.assert_close(none, scores[:, earlier])


@pytest.mark.parametrize("together", [False, True], ids=["any", "largest"])
def test_a_tile_keeps_the_same_blocks_for_all_its_rows(layer, together):
    layer, wanted = layer
    kept = keeping(layer, wanted, 0.5, together=together)
    assert (kept | ~layer.always).all()
    assert not (kept & ~layer.valid).any()
    for first in range(0, kept.shape[1], TILE):
        rows, valid = kept[:, first : first + TILE], layer.valid[first : first + TILE]
        assert (rows == (rows.any(1, keepdim=True) & valid)).all()
    own = experiment.chosen(layer, parse(POLICY.format(0.5)), wanted)
    assert together or (kept | ~own).all()
    scores, products = coarse(layer, 16, 4, 0.5, together=together)
    share = (scores[:, layer.valid] > -math.inf).float().mean()
    assert products == pytest.approx(float(share) + 1 / 64)


def test_roundings():
    torch.manual_seed(0)
    x = torch.randn(2, 64, 32) * torch.tensor([1.0, 1e6])[:, None, None]
    each = in_fp8(x, per_head=True)
    # Three bits behind the leading one.
    assert ((each - x).abs() <= x.abs() / 16 + x.abs().amax((1, 2), keepdim=True) / 448 / 512).all()
    assert (in_fp8(x, per_head=False)[0] - x[0]).norm() > 2 * (each[0] - x[0]).norm()
    k, q = torch.randn(8, 32), torch.randn(8, 32)
    first = (k[:, :16].half().float() @ q[:, :16].half().float().mT).half()
    second = k[:, 16:].half().float() @ q[:, 16:].half().float().mT
    assert torch.equal(in_fp16(k, q), (first.float() + second).half().float())
    assert torch.equal(averaged(x, 4)[:, 0], x[:, :4].mean(1))


def test_gates_that_score_exactly_are_the_gates():
    model, tokenizer = bundled.load_teacher()
    window = bundled.text_tokens(tokenizer)[1][:600].astype(np.int64)
    policy = POLICY.format(0.7)
    plain = measured(model, bundled.load_teacher_gates(), policy, windows=[window])
    gates = experiment.approximate(bundled.load_teacher_gates(), exact)
    ours = measured(model, gates, policy, windows=[window])
    assert ours.density == plain.density
    np.testing.assert_allclose(ours.losses[0], plain.losses[0], rtol=1e-4, atol=1e-4)
    gates = experiment.approximate(gates, ways()["no totals"])
    other = measured(model, gates, policy, windows=[window])
    assert other.density == plain.density
    assert not np.allclose(other.losses[0], plain.losses[0])


def test_a_run_says_what_is_kept_and_goes_on(run_script, tmp_path):
    (tmp_path / "book.txt").write_text(bundled.TEXT.read_text(encoding="utf-8")[:9000], encoding="utf-8")
    some = ["fp8", "coarse 4x1, any, 20%"]
    given = ["--heldout", tmp_path / "book.txt", "--out", tmp_path / "out", "--window", 1024, "--windows", 1]
    given += ["--densities", 0.5, 0.1, "--ways", *some]
    shown = run_script(MODULE, "ranking", *given)
    found = read_json(tmp_path / "out" / "ranking.json")
    assert table([found]) in shown
    assert [*found["ways"]] == ["exact", *some]
    assert relative(found["ways"], "exact", "0.5") == (1, 1, 1)
    assert all(0.5 < share <= 1 for share in relative(found["ways"], "fp8", "0.5"))
    assert found["ways"]["fp8"]["0.5"]["worst"] <= relative(found["ways"], "fp8", "0.5")[0]
    # 10 % of 16 blocks are read anyway.
    assert "no choice" in shown
    assert 0 <= found["bounds"]["1"]["0.5"]["tile"] <= found["bounds"]["1"]["0.5"]["alone"] < 1
    given = [*given[: given.index("--densities")], "--densities", 0.5, "--documents", 1, "--ways"]
    run_script(MODULE, "quality", *given, "fp8")
    before = read_json(tmp_path / "out" / "quality.json")["rows"]
    assert [*before] == ["dense", "fp8"]
    run_script(MODULE, "quality", *given, "fp8", "exact")
    rows = read_json(tmp_path / "out" / "quality.json")["rows"]
    assert [*rows] == ["dense", "fp8", "exact"]
    assert rows["fp8"] == before["fp8"]
    assert rows["fp8"]["perplexity"]["0.5"]["density"] == rows["exact"]["perplexity"]["0.5"]["density"]
    with pytest.raises(SystemExit, match="of other settings"):
        run_script(MODULE, "quality", *given, "fp8", "--questions", 1)
