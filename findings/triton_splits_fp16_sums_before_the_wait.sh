#!/usr/bin/env bash
# Hopper products whose sums are fp16 do not overlap in Triton 3.6.0 to 3.9.0, although they are asked for asynchronously:
# Triton takes the pairs of numbers apart right behind the instruction that starts a product, before the wait for it. CUDA's
# assembler sees registers read that the product still writes, and adds waits of its own (C7517, or C7514 in larger kernels,
# which it says with -v alone). Sums in fp32, which are one number per register, do overlap.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
# Triton reads a kernel's source from its file.
cat > kernels.py <<'PYTHON'
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def products(a, b, out, SUMS: gl.constexpr):
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    loads: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    at = gl.arange(0, 64, gl.SliceLayout(1, loads))[:, None] * 64 + gl.arange(0, 64, gl.SliceLayout(0, loads))[None, :]
    rows = gl.allocate_shared_memory(gl.float16, [64, 64], tile, gl.load(a + at))
    columns = gl.allocate_shared_memory(gl.float16, [64, 64], tile, gl.load(b + at))
    fence_async_shared()
    zero = gl.zeros([64, 64], SUMS, sums)
    first = warpgroup_mma(rows, columns, zero, use_acc=False, is_async=True)
    second = warpgroup_mma(rows, columns.permute((1, 0)), zero, use_acc=False, is_async=True)
    first = warpgroup_mma_wait(1, deps=[first])
    second = warpgroup_mma_wait(0, deps=[second])
    to = gl.arange(0, 64, gl.SliceLayout(1, sums))[:, None] * 64 + gl.arange(0, 64, gl.SliceLayout(0, sums))[None, :]
    gl.store(out + to, gl.maximum(first, second))
PYTHON
cat > compile.py <<'PYTHON'
import re
import subprocess
from pathlib import Path

import kernels
import triton
import triton.experimental.gluon.language as gl
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

# 3.9.0 assembles for Hopper with the newer of the two that it brings.
newer = "-blackwell" if triton.__version__ == "3.9.0" else ""
assembler = Path(triton.__file__).parent / f"backends/nvidia/bin/ptxas{newer}"
for sums, name, split, said in ((gl.float32, "fp32", False, False), (gl.float16, "fp16", True, True)):
    types = {"a": "*fp16", "b": "*fp16", "out": "*" + name, "SUMS": "constexpr"}
    source = GluonASTSource(kernels.products, types, {(3,): sums})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    # From the first product's start to the first wait.
    flight = ptx[ptx.index("wgmma.commit_group") : ptx.index("wgmma.wait_group")]
    pairs = len(re.findall(r"mov\.b32\s+\{%rs\d+, %rs\d+\}, %r\d+;", flight))
    Path("products.ptx").write_text(ptx)
    command = [assembler, "-v", "-arch=sm_90a", "products.ptx", "-o", "products.cubin"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    serial = "C7517" in told or "C7514" in told
    print(f"triton {triton.__version__}, sums in {name}: {pairs} pairs taken apart before the wait, waits added: {serial}")
    assert (pairs > 0) == split, "that has changed"
    assert serial == said, told
PYTHON
for package in triton==3.6.0 triton==3.7.1 triton==3.8.0 triton==3.9.0; do
    python3 -m venv venv
    venv/bin/pip install --quiet --disable-pip-version-check "$package"
    TRITON_CACHE_DIR="$folder/cache-$package" venv/bin/python -W ignore compile.py 2> said || { cat said; exit 1; }
    rm -rf venv
done
