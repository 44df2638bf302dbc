#!/usr/bin/env bash
# Triton's interpreter rounds to float8_e4m3fn otherwise than PyTorch: ties go away from zero, not to the even number,
# and numbers that round to the smallest ones there are become zero.
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
def rounded(numbers, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(numbers + at).to(out.dtype.element_ty))
"""
)
sys.path.insert(0, ".")
import torch
import triton
from kernel import rounded

print("triton", triton.__version__, "torch", torch.__version__)
# Two halfway between neighbours, one that is not, and a little more than half of the smallest number.
numbers = torch.tensor([1.0625, -17.0, 1.07, 0.0012])
out = torch.empty(4, dtype=torch.float8_e4m3fn)
rounded[(1,)](numbers, out, 4)
found = {"torch": numbers.to(torch.float8_e4m3fn).tolist(), "interpreter": out.tolist()}
print("numbers", [round(x, 4) for x in numbers.tolist()])
for name, values in found.items():
    print(f"  {name}: {values}")
assert found["torch"] == [1.0, -16.0, 1.125, 0.001953125], "PyTorch rounds otherwise now"
assert found["interpreter"] == [1.125, -18.0, 1.125, 0.0], "the interpreter rounds otherwise now"
PYTHON
