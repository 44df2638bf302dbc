#!/usr/bin/env bash
# What becomes of a number that float8_e4m3fn cannot hold depends on who rounds it: PyTorch takes its largest, 448, for
# all that is beyond, infinity too; ml_dtypes, by which JAX and NumPy round, makes NaN of it. PyTorch itself makes NaN of it
# in the format of AMD's first chips, e4m3fnuz, and infinity in e5m2. Summaries or weights rounded by one are not the other's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 ml_dtypes==0.6.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import ml_dtypes
import numpy
import torch

print("torch", torch.__version__, "ml_dtypes", ml_dtypes.__version__)
numbers = [464.0, 500.0, float("inf")]
found = {}
for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"):
    for scale in (1, 1e6):
        given = [number * scale for number in numbers]
        by_torch = torch.tensor(given).to(getattr(torch, name)).float().tolist()
        by_numpy = numpy.array(given, numpy.float32).astype(getattr(ml_dtypes, name)).astype(float).tolist()
        found[name, scale] = str(by_torch), str(by_numpy)
        print(f"{name} of {given}: torch {by_torch}, ml_dtypes {by_numpy}")
assert found["float8_e4m3fn", 1] == ("[448.0, 448.0, 448.0]", "[448.0, nan, nan]")
assert found["float8_e4m3fn", 1e6] == ("[448.0, 448.0, 448.0]", "[nan, nan, nan]")
assert found["float8_e4m3fnuz", 1e6] == ("[nan, nan, nan]",) * 2
assert found["float8_e5m2", 1e6] == ("[inf, inf, inf]",) * 2
PYTHON
