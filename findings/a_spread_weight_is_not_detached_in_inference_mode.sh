#!/usr/bin/env bash
# torch 2.13.0: in inference mode a parameter that is spread over processes (a DTensor) can be cloned and multiplied, but
# not detached or viewed, which a plain one can: "Cannot set version_counter for inference tensor". So `state_dict()`
# fails there as well, for a model that FSDP2 or tensor parallelism has spread.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cd "$folder"
cat > spread.py <<'PYTHON'
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
mesh = init_device_mesh("cpu", (1,))
plain, spread = nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False)
spread.weight = nn.Parameter(distribute_tensor(spread.weight.detach(), mesh, [Shard(0)]))
asked = {
    "detach": lambda layer: layer.weight.detach(),
    "view": lambda layer: layer.weight.view(8),
    "state_dict": lambda layer: layer.state_dict(),
    "clone": lambda layer: layer.weight.clone(),
    "product": lambda layer: layer.weight * 2,
}
print("torch", torch.__version__)
for name, run in asked.items():
    said = []
    for layer in (plain, spread):
        run(layer)
        with torch.inference_mode():
            try:
                run(layer)
                said.append("runs")
            except RuntimeError as error:
                said.append(str(error).splitlines()[0])
    print(f"{name}: of a plain weight {said[0]}, of a spread one {said[1]}")
    fails = name in ("detach", "view", "state_dict")
    expected = "Cannot set version_counter for inference tensor" if fails else "runs"
    assert said == ["runs", expected], "that has changed"
distributed.destroy_process_group()
PYTHON
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
OMP_NUM_THREADS=1 venv/bin/python spread.py
