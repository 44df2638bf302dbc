"""Triton kernels without a GPU: interpreted, each op in a process of its own, and compiled for Hopper."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from seerattention.ops.block_sparse_attention import triton as attending
from seerattention.ops.block_sparse_attention.kernels import forward as _attention_kernel
from seerattention.ops.block_sparse_decode import _triton_kernel as _decode_kernel
from seerattention.ops.block_sparse_decode import triton as decoding
from seerattention.ops.language import padded
from seerattention.ops.pooled_attention import triton as pooled
from seerattention.ops.rotate_back import triton as rotating
from seerattention.ops.score_blocks import _shares_kernel, _triton_kernel
from seerattention.ops.score_blocks import triton as scoring
from seerattention.ops.select_blocks.kernels import choosing, scores
from seerattention.ops.select_decode_blocks import _triton_kernel as _choosing_kernel
from seerattention.ops.select_decode_blocks import triton as choosing_tokens
from seerattention.ops.summarise_blocks import triton as summarising
from seerattention.ops.update_summaries import triton as updating

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

HOPPER = GPUTarget("cuda", 90, 32)
compiles = pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="kernels are interpreted here")
# Said once per process: how products and sums are fused by default will change in Triton 3.10.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset:UserWarning")


def typed(kernel: Any, constants: dict[str, Any], types: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `ASTSource`: everything that is no constant and has no type is a whole number."""
    names = kernel.arg_names
    kinds = dict.fromkeys(names, "i32") | types | dict.fromkeys(constants, "constexpr")
    fixed = {(names.index(name),): value for name, value in constants.items()}
    return {"signature": {name: kinds[name] for name in names}, "constexprs": fixed}


@compiles
@pytest.mark.parametrize(
    ("dim", "per_kv_head", "direct", "mass"),
    [(64, False, False, False), (128, True, True, False), (128, True, True, True)],
)
def test_the_pooled_kernel_compiles_for_hopper(dim: int, per_kv_head: bool, direct: bool, mass: bool) -> None:
    launch = pooled.launch_of(dim, 4096, 2)
    constants = {
        "HEADS": 32, "KV_HEADS": 8, "PER_KV_HEAD": per_kv_head, "MASS": mass, "D": dim, "BLOCK_D": dim,
        "BLOCK_Q": 1 if per_kv_head else 64, "BLOCK_K": 64, "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n, "CHUNK": 32, "DIRECT": direct, "TMA": True, "HAS_V": True,
        "SOFTCAP": False, "SINKS": False, "LSE": False, "SEQUENCES": 0, "STAGES": launch.stages,
    }  # fmt: skip
    tile = f"tensordesc<bf16[1, 1, {launch.block_n}, {dim}]>"
    types: dict[str, Any] = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16")
    types |= dict.fromkeys(("map_ptr", "lse_ptr", "scratch_ptr", "sinks_ptr"), "*fp32")
    types |= dict.fromkeys(("counter_ptr", "starts_q_ptr", "starts_k_ptr"), "*i32")
    types |= {"k_desc": tile, "v_desc": tile, "scale": "fp32", "softcap": "fp32"}
    types |= dict.fromkeys(("q_strides", "k_strides", "v_strides", "out_strides"), ("i32",) * 3)
    source = ASTSource(pooled.pooled_kernel, **typed(pooled.pooled_kernel, constants, types))
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    made = triton.compile(source, target=HOPPER, options=options)
    # What a program may have on Hopper is 227 KiB.
    assert made.metadata.shared <= 227 * 1024
    assert "wgmma.mma_async" in made.asm["ptx"]
    assert "cp.async.bulk.tensor" in made.asm["ptx"]


@compiles
@pytest.mark.parametrize("name", ["score", "back to queries", "back to keys"])
@pytest.mark.parametrize(("dtype", "dim"), [("bf16", 128), ("fp32", 128)])
def test_the_scoring_kernels_compile_for_hopper(name: str, dtype: str, dim: int) -> None:
    kernel = _triton_kernel.score if name == "score" else _triton_kernel.back
    kind = "narrow" if dtype == "bf16" else "wide"
    launch = scoring.LAUNCHES[kind]["score" if name == "score" else "back"]
    constants: dict[str, Any] = launch.tile()
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
    constants |= {"GROUP": 4, "E": dim, "E_PAD": dim, "SUBS_Q": 8, "SUBS_K": 8, "CAUSAL": True}
    constants |= {"BLOCK_Q": 64, "BLOCK_K": 64}
    scored = {"EXACT": True, "KEEP": True, "PRECISION": "tf32x3", "RESIDENT": launch.resident}
    constants |= scored if name == "score" else {"unit": None, "TO_KEYS": name == "back to keys"}
    names = kernel.arg_names
    types = {n: "*" + dtype for n in ("queries", "keys", "other", "out") if n in names}
    types |= {n: "*fp32" for n in ("scores", "gradient") if n in names}
    types |= {n: t for n, t in (("winners", "*u8"), ("scale", "fp32")) if n in names}
    # torch's memory begins at multiples of 16 bytes: only then are copies asynchronous.
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, t in types.items() if t.startswith("*")}
    source = ASTSource(kernel, **typed(kernel, constants, types), attrs=aligned)
    made = triton.compile(source, target=HOPPER, options=options)
    # GPUs with less shared memory than Hopper have 99 KiB of it.
    assert made.metadata.shared <= 99 * 1024
    assert ("wgmma.mma_async" in made.asm["ptx"]) == (dtype == "bf16" or name == "score")


def compiled(kernel: Any, constants: dict[str, Any], types: dict[str, Any], options: dict[str, int]) -> Any:
    """Compile a kernel for Hopper; torch's memory begins at multiples of 16 bytes, strides are such."""
    names = kernel.arg_names
    types = {name: kind for name, kind in types.items() if name not in constants}
    places = [(names.index(n),) for n, t in types.items() if t[0][0] == "*"]
    places += [(names.index(n), i) for n, t in types.items() if isinstance(t, tuple) for i in range(len(t))]
    aligned = {place: [["tt.divisibility", 16]] for place in places}
    source = ASTSource(kernel, **typed(kernel, constants, types), attrs=aligned)
    return triton.compile(source, target=HOPPER, options=options)


@compiles
@pytest.mark.parametrize("kernel", [_shares_kernel.share, _shares_kernel.unshare], ids=["share", "unshare"])
def test_the_kernels_of_shares_compile_for_hopper(kernel: Any) -> None:
    constants: dict[str, Any] = {"SUBS": 16, "SUBS_PAD": 16, "SIZE": 4, "BLOCK_K": 64, "CAUSAL": True}
    share = "KEEP" in kernel.arg_names
    constants |= (
        {"KEEP": True, "CHUNK": 512} if share else {"SUBS_K": 16, "SUBS_K_PAD": 16, "unit": None, "CHUNK": 32}
    )
    types = dict.fromkeys(("products", "scores", "gradient", "sums"), "*fp32")
    types |= {"winners": "*u8", "pairs": "*u8", "out": "*bf16"}
    types = {name: kind for name, kind in types.items() if name in kernel.arg_names}
    made = compiled(kernel, constants, types, {})
    # Products pass through registers, none of them twice.
    assert made.metadata.shared <= 16 * 1024
    assert "st.local" not in made.asm["ptx"]


@compiles
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_the_choosing_kernels_compile_for_hopper(dim: int, shares: bool, packed: bool) -> None:
    started = scores.LAUNCHES["narrow shares" if shares else "narrow"]
    options = scores._tile(started, dim, 2, "tf32x3", 1 if shares else 16, 16)
    launch = {key: options.pop(key) for key in ("num_warps", "num_stages", "maxnreg") if key in options}
    heads = {"HEADS": 32, "BLOCK_Q": 64, "BLOCK_K": 64} | ({} if packed else {"sequences": None})
    constants = heads | {"GROUP": 4, "E": dim, "SUBS_Q": 16, "SUBS_K": 16, "PRECISION": "tf32x3"} | options
    constants |= {"SUBS_Q": 1, "BLOCK_Q": 4, "EXACT": True} if shares else {"EXACT": False}
    types = {"queries": "*bf16", "keys": "*bf16", "scores": "*fp32", "sequences": "*i32", "scale": "fp32"}
    totals = {"totals": "*fp32"} if shares else {}
    heads |= {} if shares else {"totals": None}
    constants |= heads | ({"BLOCK_Q": 4} if shares else {})
    types |= totals
    made = compiled(scores.score, constants, types, launch)
    assert made.metadata.shared <= 99 * 1024
    assert "wgmma.mma_async" in made.asm["ptx"]
    types = {"scores": "*fp32", "bits": "*i32", "sequences": "*i32", "values": "*fp32"}
    types |= {"value": "fp32", "row_exponent": "fp32"} | totals
    heads |= {"TILE": options["BLOCK_N"], "SUBS": 16, "WITHIN": not packed}
    for kind in range(len(choosing.KINDS)):
        constants = heads | {"KIND": kind, "SLOPED": kind == 0, "WIDTH": 512, "EACH": 16 if shares else 0}
        constants |= {"TOGETHER": choosing.TOGETHER, "STEPS": 0}
        if not packed and kind:
            constants["values"] = None
        compiled(choosing.choose, constants, types, {"num_warps": 1})
        if shares and not packed:
            # What the Hopper kernel's scores are chosen from; pieces of a prompt may begin within a block.
            steps = constants | {
                "TILE": scores.HOPPER_BLOCKS,
                "STEPS": scores.HOPPER_STEPS,
                "WITHIN": kind > 0,
            }
            made = compiled(choosing.choose, steps, types | {"scores": "*i16"}, {"num_warps": 1})
            assert made.asm["ptx"].count("max.s16x2") >= 16


@compiles
@pytest.mark.parametrize(("dim", "packed"), [(64, False), (96, False), (96, True)])
def test_the_summarising_kernel_compiles_for_hopper(dim: int, packed: bool) -> None:
    options = summarising._tile(summarising.LAUNCHES["project"], 4)
    launch = {key: options.pop(key) for key in ("num_warps", "num_stages")}
    constants = {
        "HEADS": 32,
        "GROUPS": 1,
        "D": 128,
        "E": dim,
        "D_PAD": 64,
        "E_PAD": padded(dim // 2),
        "SIZE": 4,
    }
    constants |= {"PLACES": (0, 1, 2), "HELD": dim == 64, "PRECISION": "tf32x3", "norm": None} | options
    constants |= {} if packed else {"edges": None}
    types = dict.fromkeys(("x", "weight", "out"), "*bf16") | dict.fromkeys(("cos", "sin"), "*fp32")
    made = compiled(summarising._summarise, constants, types | {"edges": "*i32", "eps": "fp32"}, launch)
    assert made.metadata.shared <= 99 * 1024


@compiles
def test_the_kernel_that_rotates_back_compiles_for_hopper() -> None:
    constants = {"HALF": 64, "TURNS": 64, "PAD": 64, "TOKENS": rotating.TOKENS, "HEADS": rotating.HEADS}
    constants |= {f"{name}_d": 1 for name in ("x", "out", "cos", "sin")}
    types = {"x": "*bf16", "out": "*bf16", "cos": "*fp32", "sin": "*fp32"}
    # Strides are known to be multiples of 16, so a thread moves 16 bytes at once.
    strides = {f"{name}_{of}": "i32" for name in types for of in "bt"} | {"x_h": "i32", "out_h": "i32"}
    kernel = rotating._rotate_back
    names = kernel.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*types, *strides)}
    source = ASTSource(kernel, **typed(kernel, constants, types | strides), attrs=aligned)
    made = triton.compile(source, target=HOPPER, options={"num_warps": 4})
    assert made.metadata.shared <= 16 * 1024
    assert "ld.global.v4" in made.asm["ptx"]


@compiles
@pytest.mark.parametrize("sequences", [0, 8])
@pytest.mark.parametrize("dim", [64, 128])
def test_the_kernel_of_prefill_compiles_for_hopper(dim: int, sequences: int) -> None:
    asynchronous = {}
    for page in (0, 16, 64, 256):
        launch = attending.launch_of(dim, (64, min(64, page or 64)), 2)
        constants = launch.tile()
        options = {
            key: constants.pop(key) for key in ("num_warps", "num_stages", "maxnreg") if key in constants
        }
        constants |= {"HEADS": 32, "KV_HEADS": 8, "BIT_HEADS": 8, "D": dim, "BLOCK_D": dim, "BLOCK_Q": 64}
        constants |= {"BLOCK_K": 64, "PAGE": page, "SOFTCAP": False, "SINKS": False, "LSE": False}
        constants |= {"SEQUENCES": sequences, "STAGES": launch.stages}
        constants |= {} if page else {"pages_ptr": None, "stride_pages": None}
        types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16")
        types |= dict.fromkeys(("lse_ptr", "sinks_ptr"), "*fp32")
        whole = ("bits_ptr", "scratch_ptr", "counter_ptr", "starts_q_ptr", "starts_k_ptr", "pages_ptr")
        types |= dict.fromkeys(whole, "*i32")
        strides: Any = dict.fromkeys(("q_strides", "k_strides", "v_strides", "out_strides"), ("i32",) * 3)
        numbers = {"scale": "fp32", "softcap": "fp32"}
        made = compiled(_attention_kernel.attention_kernel, constants, types | strides | numbers, options)
        assert launch.programs * made.metadata.shared <= 227 * 1024
        assert "wgmma.mma_async" in made.asm["ptx"]
        asynchronous[page] = made.asm["ptx"].count("cp.async.cg")
    # Copies are asked for as far ahead as without pages; a page's number widened where it is read ends that.
    assert asynchronous[0] == asynchronous[64] == asynchronous[256] == 4 * asynchronous[16] > 0


@compiles
@pytest.mark.parametrize("page", [0, 2])
@pytest.mark.parametrize("dim", [64, 128])
def test_the_decoding_kernels_compile_for_hopper(dim: int, page: int) -> None:
    launch = decoding.LAUNCHES[2, dim][0]
    shared = {"HEADS": 32, "LISTS": 8, "D": dim, "BLOCK_D": dim, "SPLITS": 16, "SOFTCAP": False, "LSE": True}
    shared |= {"PDL": True}
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16")
    types |= dict.fromkeys(("lse_ptr", "parts_ptr", "state_ptr", "sinks_ptr"), "*fp32")
    types |= dict.fromkeys(("bits_ptr", "scratch_ptr", "lengths_ptr", "starts_ptr", "pages_ptr"), "*i32")
    strides: Any = dict.fromkeys(("q_strides", "k_strides", "v_strides", "out_strides"), ("i32",) * 3)
    numbers = {"scale": "fp32", "softcap": "fp32"}
    constants = shared | {
        "KV_HEADS": 8,
        "BIT_HEADS": 8,
        "BLOCK_K": 64,
        "BLOCK_M": 16,
        "PAGE": page,
        "WORDS": 64,
    }
    constants |= {"BLOCK_N": launch.block_n, "STAGES": launch.stages, "LENGTHS": True, "SINKS": False}
    constants |= {"STARTS": not page}
    made = compiled(_decode_kernel.decode_kernel, constants, types | strides | numbers, options)
    # Three share the 227 KiB that a multiprocessor of Hopper has.
    assert 3 * made.metadata.shared <= 227 * 1024
    assert "cp.async" in made.asm["ptx"]
    assert "griddepcontrol.wait" in made.asm["ptx"]
    merged = ("out_ptr", "lse_ptr", "parts_ptr", "state_ptr")
    types = {name: types[name] for name in merged} | {"out_strides": ("i32",) * 3, "scale": "fp32"}
    compiled(_decode_kernel.merge_kernel, shared | {"EXACT": False}, types, {"num_warps": 4})


@compiles
@pytest.mark.parametrize(
    ("dim", "subs", "tokens"), [(96, 1, 1), (128, 4, 4), (16, 64, 1), (16, 64, 4), (32, 16, 1)]
)
def test_the_kernels_that_choose_for_tokens_compile_for_hopper(dim: int, subs: int, tokens: int) -> None:
    pointers = ("q_ptr", "weight_ptr", "keys_ptr", "norm_ptr", "summaries", "tail", "k", "weight", "norm")
    types: dict[str, Any] = dict.fromkeys(pointers, "*bf16")
    floats = ("parts_ptr", "scores_ptr", "cos_ptr", "sin_ptr", "cos", "sin", "out_ptr")
    types |= dict.fromkeys(floats, "*fp32") | dict.fromkeys(("scale", "eps", "value"), "fp32")
    types |= dict.fromkeys(("lengths_ptr", "bits_ptr", "lengths", "counters_ptr"), "*i32")
    strides = ("q_strides", "key_strides", "summary_strides", "tail_strides", "k_strides")
    types |= dict.fromkeys(strides, ("i32",) * 3)
    gate = {"KV_HEADS": 8, "GROUP": 4, "D": 128, "E": dim, "PRECISION": "tf32x3", "PDL": True}
    query = gate | {"POOLS": 3, "BLOCK_D": 128} | choosing_tokens.QUERIES.tile()
    choose = gate | {"BLOCK_K": 64, "KIND": 1, "WIDTH": 512, "BITS": 4, "num_warps": 4}
    rows, wide = 1 if tokens == 1 else 16, padded(dim)
    score = choose | {"E_PAD": wide, "SUBS": subs, "ROWS": rows, "TOGETHER": tokens == 1}
    launch, held = choosing_tokens._tile(subs, wide, rows)
    score |= launch.tile() | held
    half = padded(dim // 2)
    update = gate | {"GROUPS": 1, "D_PAD": 64, "E_PAD": half, "BLOCK_K": 64, "BLOCK_T": tokens, "SUBS": subs}
    update |= {"ROWS": max(16, subs), "UNROLL": 1 if subs == 64 else 4, "PLACES": (0, 1, 2), "num_warps": 8}
    kernels = {
        _choosing_kernel.query_kernel: query,
        _choosing_kernel.score_kernel: score,
        _choosing_kernel.choose_kernel: choose,
        updating._update: update,
    }
    for kernel, given in kernels.items():
        options = {name: given[name] for name in ("num_warps", "num_stages") if name in given}
        constants = {name: value for name, value in given.items() if name in kernel.arg_names}
        own = {name: kind for name, kind in types.items() if name in kernel.arg_names}
        made = compiled(kernel, constants, own, options)
        assert made.metadata.shared <= 99 * 1024
        if kernel is _choosing_kernel.score_kernel and subs > 1:
            # A thread loads 16 bytes of summaries at once.
            assert "ld.global.v4" in made.asm["ptx"]
        assert ("griddepcontrol.wait" in made.asm["ptx"]) == ("PDL" in constants)


@pytest.mark.parametrize(
    "files",
    [
        ("block_sparse_attention/interpreted_triton", "summarise_blocks/interpreted_triton"),
        ("block_sparse_attention/interpreted_gradients", "select_blocks/interpreted_triton"),
        ("pooled_attention/interpreted_triton", "score_blocks/interpreted_triton"),
        ("block_sparse_decode/interpreted_triton", "select_decode_blocks/interpreted_triton"),
        ("update_summaries/interpreted_triton", "rotate_back/interpreted_triton"),
    ],
    ids=" ".join,
)
def test_kernels_in_the_interpreter(files: tuple[str, ...]) -> None:
    # It must be asked for before kernels are defined, and nothing else is to meet it.
    paths = [str(Path(__file__).parent / f"{file}.py") for file in files]
    command = [sys.executable, "-m", "pytest", "-q", "--durations=3", *paths]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
