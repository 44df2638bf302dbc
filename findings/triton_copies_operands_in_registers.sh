#!/usr/bin/env bash
# Triton 3.8.0 and 3.9.0 copy a left operand that lies in registers before every Hopper product that reads it, 3.6.0 and
# 3.7.1 do not. A tile that many products read, as the queries of attention, then takes its registers again for each
# product in flight; where these are short, CUDA's assembler puts one product after the other. What is compiled for an
# H100 shows the copies.
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
def products(a, b, out):
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    loads: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    at = gl.arange(0, 64, gl.SliceLayout(1, loads))[:, None] * 64 + gl.arange(0, 64, gl.SliceLayout(0, loads))[None, :]
    rows = gl.allocate_shared_memory(gl.bfloat16, [64, 64], tile, gl.load(a + at)).load(left)
    columns = gl.allocate_shared_memory(gl.bfloat16, [64, 64], tile, gl.load(b + at))
    fence_async_shared()
    zero = gl.zeros([64, 64], gl.float32, sums)
    first = warpgroup_mma(rows, columns, zero, use_acc=False, is_async=True)
    second = warpgroup_mma(rows, columns.permute((1, 0)), zero, use_acc=False, is_async=True)
    first, second = warpgroup_mma_wait(0, deps=[first, second])
    to = gl.arange(0, 64, gl.SliceLayout(1, sums))[:, None] * 64 + gl.arange(0, 64, gl.SliceLayout(0, sums))[None, :]
    gl.store(out + to, first + second)
PYTHON
cat > compile.py <<'PYTHON'
import re
import sys

import kernels
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

source = GluonASTSource(kernels.products, {"a": "*bf16", "b": "*bf16", "out": "*fp32"})
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
# What is written between these words is not the optimiser's: a plain move there is a copy that was asked for.
asked = re.findall(r"// begin inline asm\n(.*?)// end inline asm", ptx, re.S)
copies = sum(bool(re.search(r"^\s*mov\.b32\s+%r\d+, %r\d+;", text, re.M)) for text in asked)
wgmma = ptx.count("wgmma.mma_async")
print(f"triton {triton.__version__}: {copies} copies of registers for 2 products of 64 x 64 x 64 ({wgmma} instructions)")
assert wgmma == 8, "products are made of other instructions now"
assert copies == int(sys.argv[1]), "that has changed"
PYTHON
# 64 x 64 numbers of 16 bits are 16 registers of each of 128 threads.
for case in triton==3.6.0:0 triton==3.7.1:0 triton==3.8.0:32 triton==3.9.0:32; do
    python3 -m venv venv
    venv/bin/pip install --quiet --disable-pip-version-check "${case%:*}"
    TRITON_CACHE_DIR="$folder/cache-${case%:*}" venv/bin/python -W ignore compile.py "${case#*:}" 2> said || { cat said; exit 1; }
    rm -rf venv
done
