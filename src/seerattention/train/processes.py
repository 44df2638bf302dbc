"""Several processes that share a step: who they are, and tensors that are sharded over them."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from seerattention.hosts.transformers import named_device


def make_accelerator(device: str = "") -> Accelerator:
    """Return Accelerate's view of the processes that a launcher started, for models on a device.

    Its state is one per process and refuses a CPU after a GPU; a single process needs no such choice.
    """
    launched = torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()
    return Accelerator(cpu=launched and named_device(device).type == "cpu")


def shard_layers(model: PreTrainedModel, root: nn.Module, accelerator: Accelerator) -> None:
    """Shard a model over the processes, a unit per layer, as Accelerate's FSDP2 plugin says.

    The parameters that are trained and those that are not stay so. ``root`` is the module whose forward pass
    runs everything: the rest of its parameters is one unit.

    Raises:
        ValueError: If there is one process only.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if accelerator.num_processes < 2:
        raise ValueError("there is one process, nothing to shard over; start several by accelerate launch")
    plugin = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 else None
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    reshard = plugin is None or bool(plugin.reshard_after_forward)
    layers = model.get_decoder().layers
    assert isinstance(layers, nn.ModuleList)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(root, mesh=mesh, reshard_after_forward=reshard)


def summed(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    total = accelerator.reduce(tensor, "sum")
    assert isinstance(total, Tensor)
    return total


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as one piece; of a sharded one, all processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a value on a parameter's device and, where it has the parameter's shape, sharded like it."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)
