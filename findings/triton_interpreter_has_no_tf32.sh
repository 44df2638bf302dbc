#!/usr/bin/env bash
# Triton's interpreter multiplies float32 matrices exactly whatever input_precision says, so that tests in it cannot
# see the error of tf32, which is the default of tl.dot on a GPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 triton==3.9.0
cd "$folder"
TRITON_INTERPRET=1 venv/bin/python - <<'PYTHON'
import sys
from pathlib import Path

# Triton reads a kernel's source from its file.
Path("kernel.py").write_text(
    """import triton
import triton.language as tl


@triton.jit
def product(a, b, out, N: tl.constexpr, PRECISION: tl.constexpr):
    where = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + where, tl.dot(tl.load(a + where), tl.load(b + where), input_precision=PRECISION))
"""
)
sys.path.insert(0, ".")
import torch
import triton
from kernel import product

print("triton", triton.__version__)
torch.manual_seed(0)
a, b = torch.randn(64, 64), torch.randn(64, 64)
exact = a.double() @ b.double()
errors, outs = {}, []
for precision in ("ieee", "tf32x3", "tf32"):
    out = torch.empty(64, 64)
    product[(1,)](a, b, out, 64, precision)
    outs.append(out)
    errors[precision] = float((out - exact).abs().max())
# What tf32 is: 10 bits of the fraction are left of 23.
cut = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for x in (a, b)]
really = float((cut[0] @ cut[1] - exact).abs().max())
print("errors in the interpreter:", errors, "- of numbers cut to tf32:", really)
assert torch.equal(outs[0], outs[2]) and max(errors.values()) < really / 100, "the interpreter knows tf32 now"
PYTHON
