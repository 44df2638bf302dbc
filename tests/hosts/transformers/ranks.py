"""Processes that share a model, as torchrun starts them: over gloo, on the CPU."""

import datetime
import os
from uuid import uuid4

import torch
from torch import distributed as dist
from torch import multiprocessing
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

#: A collective that one process does not take part in ends with an error.
PATIENCE = datetime.timedelta(seconds=60)


def together(size, folder, work, *args):
    """What ``work(*args)`` returns in each of so many processes; one that fails or dies ends all."""
    # What every process imports is imported once.
    multiprocessing.get_context("forkserver").set_forkserver_preload([work.__module__])
    meet = folder / uuid4().hex
    multiprocessing.start_processes(_one, (size, meet, work, args), nprocs=size, start_method="forkserver")
    return [torch.load(f"{meet}.{rank}", weights_only=False) for rank in range(size)]


def _one(rank, size, meet, work, args):
    torch.set_num_threads(1)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ.update(zip(names, map(str, (rank, rank, size, size)), strict=True))
    where = f"file://{meet}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=size, timeout=PATIENCE)
    torch.save(work(*args), f"{meet}.{rank}")
    dist.destroy_process_group()


def load(folder, dtype=torch.float32, plan=None):
    """A model, spread over the processes there are by its own plan or another."""
    changes = {}
    if dist.is_initialized():
        changes["distributed_config"] = DistributedConfig(tp_size=dist.get_world_size())
    if plan is not None:
        # 5.16 takes no other plan than the configuration's.
        changes["config"] = AutoConfig.from_pretrained(folder)
        changes["config"].base_model_tp_plan = plan
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **changes).eval()
    # Random text never ends by itself.
    model.generation_config.eos_token_id = None
    return model
