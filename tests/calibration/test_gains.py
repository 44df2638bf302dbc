"""Recorded rows: the gate's shares, the true mass and the gain of every block, by their definitions."""

import math
from dataclasses import replace

import pytest
import torch

from seerattention.baselines.oracle import Oracle
from seerattention.calibration import gains
from seerattention.calibration.gains import record
from seerattention.hosts.transformers import Gates, intercept
from seerattention.measure import bundled
from seerattention.measure import maps as maps_module
from seerattention.ops.attention_scores import WORK_BYTES
from seerattention.policies import TopK

KNOBS = TopK(1.0, sink_blocks=1)


@pytest.fixture(scope="module")
def teacher():
    model, tokenizer = bundled.load_teacher()
    return model, bundled.load_teacher_gates(), bundled.text_tokens(tokenizer)[1]


def calls_of(model, tokens):
    """The inputs of every attention layer."""
    calls = {}

    def handler(call):
        calls[call.layer] = call
        return call.dense()

    with intercept(model, handler), torch.no_grad():
        model(torch.from_numpy(tokens)[None], use_cache=False)
    return calls


def test_recorded_rows_are_the_gates_and_the_true_ones(teacher):
    model, gates, text = teacher
    tokens = text[:1000]
    gates.use_rotary_of(model)
    maps = record(model, gates, [tokens], KNOBS)
    assert maps.rows.tolist() == list(range(16))
    calls = calls_of(model, tokens)
    heads = gates.config.num_heads
    positions = torch.arange(1000)
    for at, (layer, gate) in enumerate(gates.items()):
        part, call = slice(at * heads, (at + 1) * heads), calls[layer]
        with torch.no_grad():
            scores = gate(call.q_nope, call.k_nope, positions=positions)[0]
        acausal = torch.ones(16, 16, dtype=torch.bool).triu(1)
        share = scores.masked_fill(acausal, -math.inf).softmax(-1)
        torch.testing.assert_close(maps.log_share[part].exp(), share)
        # The short last block's mean is over its own tokens.
        sums = Oracle(pool="sum").score(call.q, call.k, positions=positions, valid=~acausal)[0].exp()
        per_query = sums / torch.tensor([64.0] * 15 + [40.0])[:, None]
        torch.testing.assert_close(maps.mass[part], per_query, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("sinks", "group"), [(False, 1), (True, 1), (False, 3)])
def test_gain_is_how_much_nearer_the_output_comes(teacher, sinks, group, monkeypatch):
    model, gates, text = teacher
    tokens = text[:640]
    if group > 1:
        # Gates with one score per KV head, which choose for the heads of a group.
        design = replace(gates.config, per_kv_head=True, rope=False)
        gates = Gates(design, gates.base, list(dict(gates.items())))
    gates.use_rotary_of(model)
    if sinks:
        # As a model whose heads have a learnt sink each would call it.
        monkeypatch.setattr(maps_module, "intercept", with_sinks)
    maps = record(model, gates, [tokens], replace(KNOBS, local_blocks=2, dense_last_rows=1))
    call = calls_of(model, tokens)[2]
    q, k, v = call.q[0].double(), call.k[0].double(), call.v[0].double()
    k, v = k.repeat_interleave(3, 0), v.repeat_interleave(3, 0)
    scores = (q @ k.mT * call.scale).masked_fill(torch.ones(640, 640).triu(1).bool(), -math.inf).exp()

    def output(rows, read):
        """What is read, alone: the definition, one block after the other."""
        columns = torch.cat([torch.arange(64 * j, 64 * (j + 1)) for j in read])
        part = scores[:, rows][..., columns]
        total = part.sum(-1, keepdim=True) + (SINKS.double().exp()[:, None, None] if sinks else 0)
        return part @ v[:, columns] / total

    norm = output(slice(0, 640), range(10)).pow(2).sum(-1).mean(1).sum()
    for head, row in ((0, 9), (2, 6), (5, 3)):
        rows, h = slice(64 * row, 64 * (row + 1)), (12 + head) // group
        heads = slice(head // group * group, head // group * group + group)
        read = [0, row - 1, row]
        assert maps.gain[h, row, read].eq(0).all()
        free = [j for j in maps.log_share[h, row].argsort(descending=True).tolist() if 0 < j < row - 1]
        whole = output(rows, range(row + 1))
        error = (output(rows, read) - whole)[heads].pow(2).sum(-1).mean(1).sum()
        for j in free:
            read.append(j)
            less = (output(rows, read) - whole)[heads].pow(2).sum(-1).mean(1).sum()
            assert float(maps.gain[h, row, j]) == pytest.approx(
                float((error - less) / norm), rel=1e-3, abs=1e-8
            )
            error = less
        assert float(error / norm) < 1e-12


def test_rows_are_looked_at_together_as_memory_allows(teacher, monkeypatch):
    model, gates, text = teacher
    slices, scores, found = [], gains.attention_scores, []
    monkeypatch.setattr(gains, "attention_scores", lambda *a, **b: slices.append(a) or scores(*a, **b))
    for budget in (1, 2**40):
        monkeypatch.setitem(WORK_BYTES, "cpu", budget)
        found.append(record(model, gates, [text[:1000]], replace(KNOBS, local_blocks=2)))
        found.append(len(slices))
    alone, one_by_one, together, both = found
    # 8 layers of 2 KV heads, of 16 rows.
    assert (one_by_one, both - one_by_one) == (8 * 2 * 16, 8 * 2)
    torch.testing.assert_close(together.mass, alone.mass)
    torch.testing.assert_close(together.gain, alone.gain, rtol=1e-3, atol=1e-7)


SINKS = torch.linspace(-1, 2, 6)


def with_sinks(model, handler):
    return intercept(
        model, lambda call: handler(replace(call, sinks=SINKS)) if call.layer == 2 else handler(call)
    )
