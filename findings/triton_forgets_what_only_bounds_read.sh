#!/usr/bin/env bash
# Triton 3.6.0 and 3.7.1 compile a wrong program without a word: a variable that a `for` carries from turn to turn, and
# that only the bounds of a `for` within it read, stays at its first value, in Triton as in Gluon. In 3.8.0 and 3.9.0 it
# grows. https://github.com/triton-lang/triton/pull/9036 describes it. What is compiled for an H100 shows it, on a CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
# Triton reads a kernel's source from its file.
cat > kernels.py <<'PYTHON'
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@triton.jit
def in_triton(out, turns, end, step):
    begin = 0
    for turn in range(turns):
        for i in range(begin, end):
            tl.store(out + i, turn)
        begin += step


@gluon.jit
def in_gluon(out, turns, end, step):
    begin = 0
    for turn in range(turns):
        for i in range(begin, end):
            gl.store(out + i, turn)
        begin += step


@triton.jit
def stored_too(out, turns, end, step):
    begin = 0
    for turn in range(turns):
        for i in range(begin, end):
            tl.store(out + i, begin)
        begin += step
PYTHON
cat > compile.py <<'PYTHON'
import re
import sys

import kernels
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

types = {"out": "*i32", "turns": "i32", "end": "i32", "step": "i32"}
sources = {
    "in Triton": ASTSource(kernels.in_triton, types, {}),
    "in Gluon": GluonASTSource(kernels.in_gluon, types, {}),
    "in Triton, stored too": ASTSource(kernels.stored_too, types, {}),
}
print("triton", triton.__version__)
for name, source in sources.items():
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttgir"]
    # Nothing else reads `step`: where no sum does, `begin` stays 0.
    adds = re.search(r"arith\.addi .*%step\b", compiled) is not None
    print(f"  {name}: begin", "grows" if adds else "stays 0")
    assert adds == ("stored" in name or sys.argv[1] == "right"), "that has changed"
    assert adds or len(re.findall(r"%step\b", compiled)) == 1, "step is read in another way"
PYTHON
for case in triton==3.6.0:wrong triton==3.7.1:wrong triton==3.8.0:right triton==3.9.0:right; do
    python3 -m venv venv
    venv/bin/pip install --quiet --disable-pip-version-check "${case%:*}"
    TRITON_CACHE_DIR="$folder/cache-${case%:*}" venv/bin/python -W ignore compile.py "${case#*:}"
    rm -rf venv
done
