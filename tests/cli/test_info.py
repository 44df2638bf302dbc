"""``seerattention info``: every 'yes' of its table runs and is right, every 'no' has its reason."""

import json

import pytest
import torch

from seerattention.cli.info import model_report, support
from seerattention.gate import AttnGate, GateConfig
from seerattention.hosts.transformers import load_base, new_gates, save_gates
from seerattention.measure import bundled
from seerattention.ops.block_sparse_attention import BACKENDS, block_sparse_attention
from seerattention.ops.block_sparse_decode import block_sparse_decode
from seerattention.ops.pooled_attention import pooled_attention
from seerattention.ops.score_blocks import score_blocks
from seerattention.ops.select_blocks import select_blocks
from seerattention.ops.summarise_blocks import summarise_blocks
from seerattention.policies import TopK
from seerattention.selection import BlockSelection
from seerattention.testing.budget import Budget

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

ROWS = [row for row in support() if row.device == "cpu"]


def call(op, backend):
    """Return a small call of an operation, as a function of q and k."""
    torch.manual_seed(1)
    gate = AttnGate(GateConfig(2, 1, 64))
    mask = torch.eye(4, dtype=torch.bool)[None, None]
    mask[..., 0] = True
    selection = BlockSelection.from_mask(mask, (64, 64))
    last = BlockSelection.from_mask(mask[:, :, -1:], (1, 64))

    def summaries(k, name="reference"):
        weight = gate.linear_k.weight.detach().to(k.dtype)
        pools = gate.config.k_pool
        return summarise_blocks(k, gate.config.k_sub, pools, dtype=k.dtype, weight=weight, backend=name)

    def chosen(q, k):
        positions = torch.arange(q.shape[2])
        found = select_blocks(
            q, summaries(k), gate.to(q.dtype), TopK(0.5), positions=positions, backend=backend
        )
        return found.to_mask().to(q.dtype)

    return {
        "block_sparse_attention": lambda q, k: block_sparse_attention(q, k, k, selection, backend=backend),
        "block_sparse_decode": lambda q, k: block_sparse_decode(q[:, :, -1:], k, k, last, backend=backend),
        "pooled_attention": lambda q, k: pooled_attention(q, k, k, (64, 64), backend=backend)[0],
        "summarise_blocks": lambda q, k: summaries(k, backend),
        "score_blocks": lambda q, k: score_blocks(q, k, (8, 8), backend=backend),
        "select_blocks": chosen,
    }[op]


def test_the_table_is_about_every_operation():
    assert {row.op for row in ROWS} == {
        "block_sparse_attention", "block_sparse_decode", "pooled_attention", "score_blocks", "select_blocks",
        "summarise_blocks",
    }  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r.op}-{r.backend}-{r.dtype}")
@torch.no_grad()
def test_the_line_is_true(row):
    dtype = getattr(torch, row.dtype)
    q, k = (torch.randn(1, heads, 256, 64).to(dtype) for heads in (2, 1))
    run, reference = call(row.op, row.backend), call(row.op, "reference")
    if row.reasons:
        with pytest.raises(NotImplementedError) as refusal:
            run(q, k)
        for reason in row.reasons:
            assert reason in str(refusal.value)
    elif row.op == "select_blocks":
        assert torch.equal(run(q, k), reference(q, k))
    else:
        Budget.of(reference, q, k).check(run(q, k))


def test_it_lists_backends_with_reasons(invoke):
    result, said = invoke("info")
    assert result.exit_code == 0
    for name in ("gather", "reference", "chunked", "llama", "top_k:<density>", "meanpool"):
        assert name in said
    table = invoke("info", "--markdown")[0].output
    assert "| `block_sparse_attention` | `gather` | yes | yes |" in table


def test_a_model_comes_first_with_what_a_new_user_asks(invoke, base):
    result, said = invoke("info", base)
    assert result.exit_code == 0, result.output
    size = sum(p.numel() for p in new_gates(load_base(str(base))).parameters())
    model, machine = said.split("seerattention 0")
    for words in (
        f"{base}: llama",
        "heads 2 of queries, 1 of keys and values, of dimension 16",
        "longest text 256 tokens",
        f"gates {size / 1e6:.2f} M parameters, {size * 4 / 1e6:.1f} MB, in 2 layers; blocks of 64 tokens",
        "layers 0-1: sparse prefill and decoding",
        # 4 blocks: a row reads two of them, or what it sees, whatever was asked for.
        "tokens top_k:0.2 top_k:0.1 top_k:0.05",
        "256 70.0% 70.0% 70.0%",
    ):
        assert words in model
    assert "block_sparse_attention" in machine


def test_a_model_whose_settings_are_met_at_some_lengths_only():
    _, reads = model_report(str(bundled.TEACHER))
    cells = [list(column.cells) for column in reads.columns]
    assert cells[0] == ["2,048", "8,192", "32,768"]
    assert cells[2] == ["11.9%", "9.1%", "9.9%"], "10 % of 32 blocks is not even the first and the own block"


@pytest.mark.parametrize(
    "change",
    [
        {"num_key_value_heads": 0},
        {"hidden_act": "none"},
        {"hidden_size": -32},
        {"rope_parameters": {"rope_type": "no"}},
    ],
)
def test_a_damaged_configuration_is_a_sentence(invoke, base, tmp_path, change):
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    result, said = invoke("info", tmp_path)
    assert result.exit_code == 2
    assert "perhaps its files are damaged" in said


def test_it_gives_a_backends_reason_why_not(invoke, monkeypatch):
    monkeypatch.setattr(BACKENDS["flex"], "unsupported", lambda *a, **k: ["no compiler"])
    result, said = invoke("info")
    assert "[yellow]" not in result.output
    assert "no: no compiler" in said
    assert {reason for s in support() if s.backend == "flex" for reason in s.reasons} == {"no compiler"}


def test_a_folder_of_gates_says_what_they_choose_for(invoke, base, tmp_path):
    gates = new_gates(load_base(str(base)), block_size=16, phase="both")
    save_gates(gates, tmp_path / "gates", policy="top_k:0.1", decode_policy="token_budget:256")
    result, said = invoke("info", tmp_path / "gates")
    assert result.exit_code == 0, said
    assert "taught for positions" not in said
    gates.reach = 8192
    save_gates(gates, tmp_path / "gates", policy="top_k:0.1", decode_policy="token_budget:256")
    result, said = invoke("info", tmp_path / "gates")
    assert "taught for positions up to 8,192" in said
    assert "gates both, one score per query head" in said
    assert "policy top_k:0.1; decoding: token_budget:256" in said
