from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from seerattention import AttnGate, GateConfig, Threshold, TopK
from seerattention.gate import LengthRotary
from seerattention.ops.score_blocks import chunked
from seerattention.ops.shapes import Shape
from seerattention.policies import Policy, select
from seerattention.rows import Rows
from seerattention.testing.inputs import random_qkv

TYPES = [
    ("Qavg_Kmaxminavg", False),
    ("Qmaxmin_Kavg", False),
    ("Qavg_Kmax", True),
    ("Qmaxminavg_Kmaxminavg", False),
]
HEADS, DIM, BLOCK = 4, 32, 64


def qk(
    tokens: int, groups: int = 2, batch: int = 1, queries: int | None = None, dim: int = DIM
) -> tuple[Tensor, Tensor]:
    q, k, _ = random_qkv(
        Shape(
            name="",
            heads=HEADS,
            kv_heads=HEADS // groups,
            queries=queries or tokens,
            keys=tokens,
            head_dim=dim,
            batch=batch,
        )
    )
    return q, k


def config(**options: Any) -> GateConfig:
    plain = {"q_sub_block": 8, "k_sub_block": 8, "gate_dim": DIM}
    return GateConfig(**{"num_heads": HEADS, "num_kv_heads": 2, "head_dim": DIM} | plain | options)


def in_eight_bits(x: Tensor) -> Tensor:
    """Round to sign, four bits of exponent and three of fraction, by arithmetic alone."""
    exponent = x.abs().clamp_min(2.0**-6).log2().floor()
    step = torch.exp2(exponent - 3)
    # Python's rounding, to even, as IEEE's.
    return ((x / step).round() * step).clamp(-448, 448)


@pytest.mark.parametrize("shares", [False, True])
def test_summaries_are_rounded_before_they_are_multiplied(shares: bool) -> None:
    q, k = qk(300)
    plain, rounding = (AttnGate(config(shares=shares, score_dtype=x)) for x in (None, "float8_e4m3fn"))
    rounding.load_state_dict(plain.state_dict())
    with torch.no_grad():
        queries = plain.summarise_queries(q, positions=torch.arange(300))
        keys = plain.compress(k, positions=torch.arange(300))
        # Too large for eight bits, and too small.
        queries[0, 0, :2, 0], queries[0, 1, :2, 1] = 3e4, 2.0**-11
        found, rows = {}, Rows.last(300, 300)
        for gate in (plain, rounding):
            found[gate] = gate.score_summaries(queries, keys, rows=rows)
        expected = plain.score_summaries(in_eight_bits(queries), in_eight_bits(keys), rows=rows)
    torch.testing.assert_close(found[rounding], expected)
    assert (found[plain] - expected).abs().max() > 0.01


def test_gates_are_taught_without_rounding() -> None:
    q, k = qk(128)
    plain, rounding = (AttnGate(config(shares=True, score_dtype=x)) for x in (None, "float8_e4m3fn"))
    rounding.load_state_dict(plain.state_dict())
    grads = []
    for gate in (plain, rounding):
        gate(q, k).square().sum().backward()
        grads.append([p.grad for p in gate.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
        assert b.abs().max() > 0


# --- the published formula, written a second time -----------------------------------------------------


def pooled(x: Tensor, pools: list[str]) -> Tensor:
    """``[H, T, D]`` -> ``[H, N, pools * D]``, one block at a time."""
    rows = []
    for start in range(0, x.shape[1], BLOCK):
        block = x[:, start : start + BLOCK]
        parts = {"max": block.max(1).values, "min": block.min(1).values, "avg": block.sum(1) / block.shape[1]}
        rows.append(torch.cat([parts[name] for name in pools], -1))
    return torch.stack(rows, 1)


def rotated(x: Tensor, theta: float) -> Tensor:
    """Each pair (i, i + E/2) as a complex number, turned by position * theta ** (-2i / E).

    The angle is rounded to fp32, as the models' own code does: at position 1000 that is 3e-5 radians.
    """
    half = x.shape[-1] // 2
    frequency = 1 / theta ** (torch.arange(half) / half)
    angle = (torch.arange(x.shape[1]) * BLOCK).float()[:, None] * frequency
    turn = torch.polar(torch.ones(()).double(), angle.double())
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
    return torch.cat([turned.real, turned.imag], -1)


def published_scores(
    q: Tensor, k: Tensor, q_pools: list[str], k_pools: list[str], wq: Tensor | None, wk: Tensor, theta: float
) -> Tensor:
    """Scores of one sequence in fp64, ``[Hq, N, N]``: q ``[Hq, T, D]``, k ``[Hk, T, D]``."""
    groups = q.shape[0] // k.shape[0]
    pool_q, pool_k = pooled(q.double(), q_pools), pooled(k.double(), k_pools)
    if wq is None:
        gate_q, gate_k = pool_q, torch.einsum("hni,hio->hno", pool_k.repeat_interleave(groups, 0), wk)
    else:
        gate_q = torch.einsum("hni,hio->hno", pool_q, wq)
        gate_k = torch.einsum("hni,hio->hno", pool_k, wk).repeat_interleave(groups, 0)
    gate_q, gate_k = rotated(gate_q, theta), rotated(gate_k, theta)
    return torch.einsum("hid,hjd->hij", gate_q, gate_k) / math.sqrt(gate_q.shape[-1])


def check_published_scores(
    make: Callable[[GateConfig], AttnGate], gate_type: str, force_double: bool, groups: int, tokens: int
) -> tuple[Tensor, Tensor]:
    """Compare a gate of a published type with the formula; return both scores, ``[1, Hq, N, N]``."""
    design = GateConfig.published(
        gate_type,
        num_heads=HEADS,
        num_kv_heads=HEADS // groups,
        head_dim=DIM,
        force_double=force_double,
        rope_theta=500000.0,
    )
    gate = make(design)
    q, k = qk(tokens, groups)
    double = force_double or gate_type.startswith("Qmax")
    assert (gate.linear_q is not None) == double
    with torch.no_grad():
        # Scores of about one, so that 1e-5 asks as much of every type and rows are not uniform.
        gate.linear_k.weight.div_(gate(q, k).std())
        actual = gate(q, k)
        names = [[p for p in ("max", "min", "avg") if p in part] for part in gate_type.split("_")]
        wq = None if gate.linear_q is None else gate.linear_q.weight.double()
        wk = gate.linear_k.weight.double()
        assert wk.shape[0] == (HEADS // groups if double else HEADS)
        expected = published_scores(q[0], k[0], names[0], names[1], wq, wk, 500000.0)[None]
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= 1e-5
    return actual, expected


PUBLISHED = [
    pytest.param(*kind, groups, tokens, id=f"{kind[0]}-G{groups}-T{tokens}")
    for kind in TYPES
    for groups in (1, 2, 4)
    for tokens in (300, 777, 1000, 1024)
]


@pytest.mark.parametrize(("gate_type", "force_double", "groups", "tokens"), PUBLISHED)
def test_published_formula(gate_type: str, force_double: bool, groups: int, tokens: int) -> None:
    actual, expected = check_published_scores(AttnGate, gate_type, force_double, groups, tokens)
    blocks = math.ceil(tokens / BLOCK)
    options: dict[str, Any] = {"rows": Rows.last(tokens, tokens), "block_size": (BLOCK, BLOCK)}

    def chosen(policy: Policy) -> Tensor:
        return select(policy, actual, **options).to_mask()

    count = max(1, math.floor((1 - math.sqrt(1 - 0.3)) * blocks))
    top, above = torch.zeros_like(actual, dtype=torch.bool), torch.zeros_like(actual, dtype=torch.bool)
    share = 1 / blocks
    for h in range(HEADS):
        for i in range(blocks):
            row = expected[0, h, i, : i + 1]
            # The own block is the first of the count.
            best = sorted(range(i + 1), key=lambda j: (j != i, -float(row[j]), j))[:count]
            top[0, h, i, best] = True
            weights = [math.exp(x - float(row.max())) for x in row.tolist()]
            above[0, h, i, : i + 1] = torch.tensor([w / sum(weights) > share for w in weights])
            above[0, h, i, i] = True
    assert torch.equal(chosen(TopK(0.3)), top)
    assert torch.equal(chosen(Threshold(share)), above)
    assert 0.2 < above.sum() / (HEADS * blocks * (blocks + 1) / 2) < 0.9


class RotatesAtLastToken(AttnGate):
    """Seen in a short last block only: elsewhere queries and keys turn alike."""

    def compress(self, k: Tensor, *, positions: Tensor) -> Tensor:
        return super().compress(k, positions=(positions + BLOCK - 1).clamp(max=k.shape[2] - 1))

    def score(self, q: Tensor, k_blocks: Tensor, *, positions: Tensor, valid: Tensor | None = None) -> Tensor:
        last = (positions + BLOCK - 1).clamp(max=q.shape[2] - 1)
        return super().score(q, k_blocks, positions=last, valid=valid)


class ForgetsShortBlock(AttnGate):
    """Divides the sum of a short last block by the full block size."""

    def compress(self, k: Tensor, *, positions: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(k, (0, 0, 0, -k.shape[2] % BLOCK))
        return super().compress(padded, positions=torch.arange(padded.shape[2]))


class ScalesByHeadCount(AttnGate):
    def score(self, q: Tensor, k_blocks: Tensor, *, positions: Tensor, valid: Tensor | None = None) -> Tensor:
        return super().score(q, k_blocks, positions=positions, valid=valid) * 2**-0.5


@pytest.mark.parametrize("mutant", [RotatesAtLastToken, ForgetsShortBlock, ScalesByHeadCount])
def test_published_formula_notices(mutant: type[AttnGate]) -> None:
    with pytest.raises(AssertionError):
        check_published_scores(mutant, "Qavg_Kmaxminavg", False, 2, 300)


# --- this project's additions -------------------------------------------------------------------------


def set_identity(gate: AttnGate) -> AttnGate:
    """Weights that pass the average pool (the last third of the width) and nothing else."""
    with torch.no_grad():
        for linear in filter(None, (gate.linear_q, gate.linear_k)):
            linear.weight.zero_()
            linear.weight[:, -DIM:] = torch.eye(DIM)
    return gate


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 63, 64, 65, 300, 777])
@torch.no_grad()
def test_block_score_is_the_maximum_over_sub_blocks(tokens: int) -> None:
    gate = set_identity(AttnGate(config(q_sub_block=8, k_sub_block=16, rope=False)))
    q, k = qk(tokens)
    actual = gate(q, k)
    blocks = math.ceil(tokens / BLOCK)
    assert actual.shape == (1, HEADS, blocks, blocks)
    for h in range(HEADS):
        means_q = [x.mean(0) for x in q[0, h].split(8)]
        means_k = [x.mean(0) for x in k[0, h // 2].split(16)]
        for i in range(blocks):
            for j in range(blocks):
                pairs = [a @ b for a in means_q[i * 8 : (i + 1) * 8] for b in means_k[j * 4 : (j + 1) * 4]]
                assert abs(float(actual[0, h, i, j]) - float(max(pairs)) / math.sqrt(DIM)) <= 1e-5


@pytest.mark.parametrize("tokens", [64, 300])
@torch.no_grad()
def test_identity_start_is_the_product_of_means(tokens: int) -> None:
    q, k = qk(tokens)
    plain = set_identity(AttnGate(config(q_sub_block=None, k_sub_block=None, rope=False)))
    means_q = torch.stack([x.mean(1) for x in q[0].split(BLOCK, 1)], 1)
    means_k = torch.stack([x.mean(1) for x in k[0].split(BLOCK, 1)], 1).repeat_interleave(2, 0)
    expected = means_q @ means_k.mT / math.sqrt(DIM)
    torch.testing.assert_close(plain(q, k)[0], expected, rtol=0, atol=1e-6)
    # What the initialisation adds to the identity is noise with a standard deviation of 0.01.
    fresh = AttnGate(plain.config)
    for linear, identity in ((fresh.linear_q, plain.linear_q), (fresh.linear_k, plain.linear_k)):
        assert linear is not None
        assert identity is not None
        noise = linear.weight - identity.weight
        assert 0.009 < float(noise.std()) < 0.011
        assert abs(float(noise.mean())) < 0.001


@torch.no_grad()
def test_identity_without_an_average_pool() -> None:
    gate = AttnGate(config(q_pool=("max", "min"), k_pool=("max",)))
    assert gate.linear_q is not None
    third = gate.linear_q.weight.unflatten(1, (2, DIM)).diagonal(dim1=2, dim2=3)
    assert abs(float(third.mean()) - 0.5) < 0.01
    assert abs(float(gate.linear_k.weight.diagonal(dim1=1, dim2=2).mean()) - 1) < 0.01


@torch.no_grad()
def test_short_last_block_is_pooled_over_its_tokens() -> None:
    _, k = qk(70)
    gate = set_identity(AttnGate(config(k_sub_block=None, rope=False)))
    summaries = gate.compress(k, positions=torch.arange(70))
    torch.testing.assert_close(summaries[:, :, 1], k[:, :, 64:].mean(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_one_score_per_kv_head(qk_norm: bool) -> None:
    design = config(per_kv_head=True, qk_norm=qk_norm, rope=False, q_sub_block=None, k_sub_block=None)
    gate = AttnGate(replace(design, init="random"))
    q, k = qk(130)
    actual = gate(q, k)
    assert actual.shape == (1, 2, 3, 3)
    assert gate.linear_q is not None
    pool_q, pool_k = (pooled(x[0].double(), ["max", "min", "avg"]) for x in (q, k))
    for h in range(2):
        merged = torch.cat([pool_q[2 * h], pool_q[2 * h + 1]], -1) @ gate.linear_q.weight[h].double()
        keys = pool_k[h] @ gate.linear_k.weight[h].double()
        if qk_norm:
            merged, keys = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() for x in (merged, keys))
        expected = merged @ keys.T / math.sqrt(DIM)
        assert float((actual[0, h] - expected).abs().max()) <= 1e-5


@torch.no_grad()
def test_norm_is_learned() -> None:
    gate = AttnGate(config(qk_norm=True))
    q, k = qk(100)
    before = gate(q, k)
    assert gate.norm_k is not None
    gate.norm_k.weight.fill_(2)
    torch.testing.assert_close(gate(q, k), 2 * before)
    scaled = gate(3 * q, 5 * k)
    # Normalised summaries do not depend on the size of q and k (but for the norm's epsilon).
    torch.testing.assert_close(scaled, 2 * before, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_explicit_positions() -> None:
    gate = AttnGate(config())
    q, k = qk(200, batch=2)
    default = gate(q, k)
    torch.testing.assert_close(gate(q, k, positions=torch.arange(200)), default)
    # RoPE is relative: the same shift for all changes nothing but rounding; a different one does.
    shift = torch.tensor([[0], [640]])
    shifted = gate(q, k, positions=torch.arange(200) + shift)
    assert torch.equal(shifted[0], default[0])
    assert float((shifted[1] - default[1]).abs().max()) < 1e-4
    stretched = gate(q, k, positions=3 * torch.arange(200))
    assert float((stretched - default).abs().max()) > 0.01


@torch.no_grad()
def test_later_queries_score_as_rows_of_the_whole() -> None:
    for design in (config(), GateConfig.published(num_heads=HEADS, num_kv_heads=2, head_dim=DIM)):
        gate = AttnGate(design)
        q, k = qk(300)
        whole = gate(q, k)
        part = gate(q[:, :, 128:], k)
        torch.testing.assert_close(part, whole[:, :, 2:], rtol=0, atol=1e-6)


@torch.no_grad()
def test_own_rotary_code_is_used() -> None:
    gate = AttnGate(config())
    q, k = qk(200)
    plain = gate(q, k)
    seen: list[Tensor] = []

    def still(positions: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(positions)
        return torch.ones(1, positions.shape[1], DIM), torch.zeros(1, positions.shape[1], DIM)

    gate.use_rotary(still)
    unrotated = gate(q, k)
    assert [p.tolist() for p in seen] == [[list(range(0, 200, 8))]] * 2
    reference = AttnGate(replace(gate.config, rope=False))
    reference.load_state_dict(gate.state_dict())
    assert torch.equal(unrotated, reference(q, k))
    assert not torch.equal(unrotated, plain)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize(("width", "pairs"), [(32, "spread"), (80, "slowest"), (128, "slowest")])
def test_angles_without_a_model_are_a_models_to_the_bit(width: int, pairs: Any, theta: float) -> None:
    """At late positions the last bit of a frequency is most of what differs from published code."""
    rope = {"rope_type": "default", "rope_theta": theta}
    model = LlamaRotaryEmbedding(LlamaConfig(head_dim=width, rope_parameters=rope))
    positions = torch.tensor([[0, 64, 1_000, 131_008]])
    expected = [x.chunk(2, -1)[0][..., -16:].repeat(1, 1, 2) for x in model(torch.empty(0), positions)]
    narrower = GateConfig(4, 2, width, gate_dim=DIM, rope_pairs=pairs, rope_theta=theta)
    for actual, wanted in zip(AttnGate(narrower)._turns(positions, 1) or (), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_angles_of_the_first_positions_are_kept_once_for_gates_of_one_design() -> None:
    gate, device = AttnGate(config()), torch.device("cpu")
    cos, sin = gate.angles(100, device) or ()
    assert cos.shape == sin.shape == (128, DIM)
    for kept, turned in zip((cos, sin), gate._turns(torch.arange(128), 1) or (), strict=True):
        assert torch.equal(kept, turned[0])
    again = AttnGate(config()).angles(128, device)
    assert again is not None
    assert again[0] is cos
    longer = gate.angles(129, device)
    assert longer is not None
    assert len(longer[0]) == 256
    # What a captured graph reads stays.
    assert (gate.angles(100, device) or ())[0] is cos
    gate.use_rotary(LengthRotary(gate.rotary))
    assert gate.angles(100, device) is None
    assert AttnGate(replace(gate.config, rope=False)).angles(100, device) is None


@torch.no_grad()
def test_bf16_weights() -> None:
    gate = AttnGate(config())
    q, k = qk(300)
    exact = gate.double()(q, k)
    gate = gate.bfloat16()
    actual = gate(q.bfloat16(), k.bfloat16())
    assert actual.dtype == torch.float32
    # Each summary is rounded a few times to 8 bits; products of 32 of them stay within that share.
    eps = torch.finfo(torch.bfloat16).eps
    assert float((actual - exact).abs().max()) <= 4 * eps * float(exact.abs().max())
    assert gate(q, k).dtype == torch.float32


@pytest.mark.parametrize("design", [config(), config(per_kv_head=True), config(q_sub_block=None)])
@torch.no_grad()
def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch, design: GateConfig) -> None:
    gate = AttnGate(design)
    q, k = qk(777, batch=2)
    whole = gate(q, k)
    for size in (1, 30_000, 100_000):
        monkeypatch.setattr(chunked, "SLICE_BYTES", size)
        torch.testing.assert_close(gate(q, k), whole, rtol=0, atol=1e-6)


def test_gradients_reach_every_parameter() -> None:
    gate = AttnGate(config(qk_norm=True))
    q, k = qk(200)
    gate(q, k).square().sum().backward()
    for name, parameter in gate.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_parameter_names_are_stable() -> None:
    assert sorted(AttnGate(config()).state_dict()) == ["linear_k.weight", "linear_q.weight"]


def test_wrong_inputs() -> None:
    gate = AttnGate(config())
    q, k = qk(10)
    for bad_q, bad_k, message in (
        (q[:, :3], k, r"q_nope must be \[B, 4, T >= 1, 32\], got \[1, 3, 10, 32\]"),
        (q, k.repeat(1, 2, 1, 1), r"k_nope must be \[B, 2, T >= 1, 32\], got \[1, 4, 10, 32\]"),
        (q[..., :16], k, "q_nope must be"),
        (q[0], k, "q_nope must be"),
        (q[:, :, :0], k, "q_nope must be"),
    ):
        with pytest.raises(ValueError, match=message):
            gate(bad_q, bad_k)
