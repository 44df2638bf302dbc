"""What can be said of the Hopper backend without a GPU: its reasons, and that its kernel compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from seerattention import BlockSelection
from seerattention.ops.block_sparse_attention import hopper
from seerattention.ops.options import Options
from seerattention.rows import Rows

PLAIN = Options(rows=Rows.last(128, 128), scale=1.0)

#: The kernel with every size of an item (heads, tiles), of both head dimensions, with all outputs and with
#: the map.
KINDS = [
    (1, 1, 128, 0, 0),
    (1, 2, 128, 1, 0),
    (2, 1, 128, 1, 0),
    (1, 1, 64, 0, 0),
    (1, 2, 128, 0, 1),
]

COMPILE = """
import json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon._runtime import GluonASTSource
from seerattention.ops.block_sparse_attention.kernels import hopper as kernel

made = []
for heads, tiles, dim, options, pooled in json.loads(sys.argv[1]):
    tile = f"tensordesc<bf16[1, 1, 64, 64],{kernel.TILES!r}>"
    pointers = {"out": "*bf16", "lse": "*fp32", "sinks": "*fp32", "bits": "*i32", "counter": "*i32"}
    pointers |= {"maxima": "*fp32", "shares": "*fp32", "scale": "fp32"}
    # A stride of more than 31 bits takes the most room.
    pointers |= {"stride_out_b": "i64"}
    constants = {
        "D": dim, "BLOCK_Q": 64 * tiles, "PARTS": tiles,
        "STAGES": 229376 // (256 * dim) // (2 // (heads * tiles)), "WORDS": 32,
        "ITEM_HEADS": heads, "ITEM_TILES": tiles,
        "LSE": bool(options), "SINKS": bool(options), "MAP": bool(pooled),
    }
    names = kernel.attend.arg_names
    kinds = {name: pointers.get(name, "i32") for name in names} | dict.fromkeys(("qd", "kd", "vd"), tile)
    source = GluonASTSource(
        kernel.attend,
        kinds | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    made.append([compiled.metadata.shared, compiled.asm["ptx"].count("wgmma.mma_async")])
print(json.dumps(made))
"""


def reasons(dtype=torch.bfloat16, dim=128, block=(64, 64), options=PLAIN, tokens=128):
    q = torch.zeros(1, 2, tokens, dim, dtype=dtype)
    return hopper.unsupported(q, q, q, BlockSelection.full(Rows.last(tokens, tokens), block), options)


def test_a_cpu_is_refused() -> None:
    assert reasons() == ["it needs a Hopper GPU"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "take bfloat16 and float16, not torch.float32"),
        ({"dim": 96}, r"head_dim must be one of (64, 128), got 96"),
        ({"block": (32, 64)}, r"blocks must be multiples of 64 tokens, got (32, 64)"),
        ({"block": (64, 32)}, r"blocks must be multiples of 64 tokens, got (64, 32)"),
        ({"options": replace(PLAIN, softcap=30.0)}, "it has no softcap"),
        ({"options": replace(PLAIN, scale=-0.5)}, "the scale must be positive, not -0.5"),
        ({"options": replace(PLAIN, scale=0.0)}, "the scale must be positive, not 0.0"),
    ],
)
def test_reasons(change, reason) -> None:
    before, after = reasons(), reasons(**change)
    assert not any(reason in r for r in before)
    assert any(reason in r for r in after)


def test_views_that_tma_cannot_read() -> None:
    whole = torch.zeros(1, 2, 128, 132, dtype=torch.bfloat16)
    selection = BlockSelection.full(Rows.last(128, 128), (64, 64))
    fine = torch.zeros(1, 128, 2, 128, dtype=torch.bfloat16).transpose(1, 2)
    for x, wrong in ((whole[..., :128], True), (fine, False), (fine.mT[..., :64].mT, False)):
        found = hopper.unsupported(x, fine, fine, selection, PLAIN)
        assert any(r.startswith("q must be 16-byte aligned") for r in found) == wrong


@pytest.mark.parametrize(
    ("heads", "kv_heads", "sel_heads", "block", "expected"),
    [
        # Halves of a query block, whatever the lists.
        (32, 8, 32, 128, (1, 2)),
        (32, 8, 8, 256, (1, 2)),
        # Lists of 2, 4 and all heads, smaller than, as large as and larger than a KV head's group.
        (32, 8, 16, 64, (2, 1)),
        (32, 8, 8, 64, (2, 1)),
        (32, 8, 4, 64, (2, 1)),
        (32, 8, 1, 64, (2, 1)),
        (32, 8, 8, 192, (2, 1)),
        (8, 1, 4, 64, (2, 1)),
        # A list for each head; lists of three heads; two heads of a list may have different KV heads.
        (32, 8, 32, 64, (1, 1)),
        (6, 2, 2, 64, (1, 1)),
        (6, 2, 1, 64, (1, 1)),
        (12, 2, 4, 64, (1, 1)),
        (4, 4, 1, 64, (1, 1)),
        (1, 1, 1, 64, (1, 1)),
    ],
)
def test_two_parts_that_read_one_list_make_an_item(heads, kv_heads, sel_heads, block, expected) -> None:
    assert hopper.item_size(heads, kv_heads, sel_heads, block) == expected


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (12, 2), (8, 8), (6, 1), (24, 6), (16, 2)])
def test_an_item_never_mixes_lists_or_kv_heads(heads, kv_heads) -> None:
    for sel_heads in (n for n in range(1, heads + 1) if heads % n == 0):
        item_heads, _ = hopper.item_size(heads, kv_heads, sel_heads, 64)
        for first in range(0, heads, item_heads):
            item = range(first, first + item_heads)
            assert len({head // (heads // sel_heads) for head in item}) == 1
            assert len({head // (heads // kv_heads) for head in item}) == 1


class Started:
    """What stands in for a kernel: keeps what it is started with, by the names of the kernel's arguments."""

    def __init__(self) -> None:
        kernel = pytest.importorskip("seerattention.ops.block_sparse_attention.kernels.hopper")
        self.names = kernel.attend.arg_names
        self.given: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int]) -> Started:
        return self

    def __call__(self, *given: Any, num_warps: int, **constants: Any) -> None:
        self.given = dict(zip(self.names, given, strict=False)) | constants
        assert self.given.keys() == set(self.names)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    kernel = Started()
    module = SimpleNamespace(attend=kernel, descriptor=lambda x, *_: x, NUMBERS=SimpleNamespace(value=64))
    monkeypatch.setattr(hopper, "kernel", module)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    processors = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: processors)
    return kernel


#: By name: q, and the order of batch, heads and tokens in its memory.
ORDERS: dict[str, tuple[Tensor, tuple[int, int, int]]] = {
    "heads first": (torch.zeros(2, 8, 192, 64), (0, 1, 2)),
    "tokens first": (torch.zeros(2, 192, 8, 64).transpose(1, 2), (0, 2, 1)),
    "of fused q, k, v": (torch.zeros(2, 192, 12, 64)[:, :, :8].transpose(1, 2), (0, 2, 1)),
    "batch inside": (torch.zeros(192, 2, 8, 64).permute(1, 2, 0, 3), (2, 0, 1)),
    "some of the tokens": (torch.zeros(2, 8, 500, 64)[:, :, 7:199], (0, 1, 2)),
    "one of each": (torch.zeros(1, 1, 64).expand(1, 1, 1, 64), (0, 1, 2)),
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_output_lies_in_the_order_of_q(order: str, started: Started) -> None:
    q, inside = ORDERS[order]
    k = q.new_zeros(q.shape[0], 1, 192, 64)
    selection = BlockSelection.full(Rows.last(q.shape[2], 192), (64, 64))
    out, lse = hopper.run(q, k, k, selection, Options.of(q, k, return_lse=True))
    assert out.permute(*inside, 3).is_contiguous()
    assert lse is not None
    assert lse.is_contiguous()
    assert started.given["out"] is out
    strides = (64 * started.given[f"stride_out_{name}"] for name in ("b", "h", "row"))
    assert out.stride() == (*strides, 1)


def test_the_kernel_compiles_for_hopper() -> None:
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(hopper.__file__).parents[3])
    command = [sys.executable, "-c", COMPILE, json.dumps(KINDS)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for (_, _, dim, _, _), (shared, products) in zip(KINDS, json.loads(done.stdout), strict=True):
        # A Hopper multiprocessor lends a program 227 KiB.
        assert shared <= 227 * 1024
        # Per consumer: the first pair's scores, the loop's scores and values, the last values.
        assert products == 2 * (2 * dim // 16 + 2 * 128 // 16)
