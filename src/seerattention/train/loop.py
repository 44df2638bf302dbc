"""What training does around its steps: sharing out a batch, metrics, checkpoints, resuming after a kill."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from seerattention.train.checkpoint import read_checkpoint, trim_metrics, write_whole
from seerattention.train.data import Packed

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"
RUN = "run.json"

#: A document of fewer blocks teaches nothing: a gate chooses among too few.
LEAST_BLOCKS = 4

#: The tokens of a step: int64 ``[B, T]`` of one document each, or packs of several.
Batch = np.ndarray | Packed

#: Length of every document of a row, and whether it is long enough to be learned from.
Documents = list[tuple[int, bool]]


class LoopConfig(Protocol):
    """What the loop reads of a trainer's settings."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        ...

    @property
    def save_every(self) -> int:
        """Steps between checkpoints."""
        ...

    @property
    def grad_accum(self) -> int:
        """Forward passes per step on each process."""
        ...


@dataclass(frozen=True)
class Share:
    """What one process runs of a step's batch.

    Attributes:
        passes: Tokens int64 ``[B, T]`` of each forward pass, and the documents of its rows.
        learned: Tokens of the whole batch, of all processes, in documents that are learned from.
        predicted: Of these, the tokens that have one before them in their document.
    """

    passes: list[tuple[Tensor, Documents]]
    learned: int
    predicted: int


class Loop:
    """Steps until they are done, each on its own batch; a subclass says what a step does.

    Args:
        batches: The global batch of a step counted from 0, the same for the same step on every process.
        config: How many steps, and when they are saved.
        out: Folder for the checkpoint, metrics, ``run.json`` and, where tensorboard is installed, its
            logs; None keeps nothing.
        accelerator: The processes that share a step.

    Attributes:
        done: Steps done.
        saved: Steps done in the last checkpoint; 0 where there is none.
    """

    def __init__(
        self, batches: Callable[[int], Batch], config: LoopConfig, out: Path | None, accelerator: Accelerator
    ) -> None:
        self.batches = batches
        self.config = config
        self.out = out
        self.accelerator = accelerator
        self.done = self.saved = 0

    @property
    def finished(self) -> bool:
        """Whether there is no step left."""
        return self.done >= self.config.steps

    def run(self) -> Iterator[Any]:
        """Train step by step, yielding after each; stopping the iteration in between loses nothing saved."""
        board = self._board()
        while not self.finished:
            report = self._step()
            if self.out is not None:
                if self.accelerator.is_main_process:
                    with (self.out / METRICS).open("a") as log:
                        log.write(json.dumps(asdict(report)) + "\n")
                    _to_board(board, asdict(report))
                if self.done % self.config.save_every == 0 or self.finished:
                    self._save(self.out)
            yield report
        if board is not None:
            board.close()
        self._finish()

    def _step(self) -> Any:
        """Do one step and count it in ``done``; return a dataclass of what it measured."""
        raise NotImplementedError

    def _finish(self) -> None:
        """Do what comes after the last step."""

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what a checkpoint holds, by name; every process must."""
        raise NotImplementedError

    def _progress(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides tensors, as JSON types."""
        return {"step": self.done}

    def _settings(self) -> dict[str, Any]:
        """Return what a checkpoint must share with this run besides the text, as JSON types."""
        raise NotImplementedError

    def _share(self, batch: Batch, block_size: int) -> Share:
        """Return this process's part of a batch.

        Raises:
            ValueError: If nothing of it can be learned from, or it cannot be split evenly.
        """
        least = LEAST_BLOCKS * block_size
        rows = _documents(batch, least)
        lengths = [length for row in rows for length, counts in row if counts]
        if not lengths:
            raise ValueError(
                f"the batch of step {self.done} is empty or has no document of {LEAST_BLOCKS} blocks "
                f"({least} tokens)"
            )
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        parts = world * self.config.grad_accum
        if len(rows) % parts:
            raise ValueError(
                f"{len(rows)} sequences per step cannot be split evenly over {world} processes x grad_accum "
                f"{self.config.grad_accum}; give a multiple of {parts}"
            )
        tokens = torch.from_numpy(np.ascontiguousarray(batch.tokens if isinstance(batch, Packed) else batch))
        each = len(rows) // parts
        # Packs differ in their documents, so they go one at a time.
        size = 1 if isinstance(batch, Packed) else each
        start, stop = rank * each * self.config.grad_accum, (rank + 1) * each * self.config.grad_accum
        passes = [(tokens[s : s + size], rows[s]) for s in range(start, stop, size)]
        return Share(passes, sum(lengths), sum(lengths) - len(lengths))

    def _identity(self) -> dict[str, Any]:
        """Return what a checkpoint must share with this run, as JSON types."""
        first = self.batches(0)
        digest = hashlib.sha256((first.tokens if isinstance(first, Packed) else first).tobytes())
        if isinstance(first, Packed):
            digest.update(json.dumps(first.lengths).encode())
        return {**self._settings(), "text": digest.hexdigest()[:16]}

    def _write_run(self, out: Path, **more: Any) -> None:
        """Write what ran."""
        if self.accelerator.is_main_process:
            report = {**self._identity(), "processes": self.accelerator.num_processes, **more}
            write_whole(out / RUN, lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))

    def save(self) -> None:
        """Write a checkpoint now, where there is a folder for it: a run that stops here goes on from here."""
        if self.out is not None and self.saved < self.done:
            self._save(self.out)

    def _save(self, out: Path) -> None:
        """Write tensors and progress as one file, whole or not at all."""
        tensors = {}
        for name, tensor in self._tensors():
            # A sharded tensor is put together by all processes.
            tensor = whole(tensor.detach())
            if self.accelerator.is_main_process:
                tensors[name] = tensor.contiguous()
        if self.accelerator.is_main_process:
            state = json.dumps({**self._progress(), **self._identity()})
            write_whole(out / CHECKPOINT, lambda path: save_file(tensors, path, metadata={"state": state}))
        self.saved = self.done
        self.accelerator.wait_for_everyone()

    def _saved(self, out: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return progress and tensors of the checkpoint in ``out``, if there is one.

        Raises:
            ValueError: If it is damaged or of another run.
        """
        if not (out / CHECKPOINT).exists():
            return None
        state, tensors = read_checkpoint(out / CHECKPOINT, self._identity())
        self.done = self.saved = state["step"]
        if self.accelerator.is_main_process:
            trim_metrics(out / METRICS, self.done)
        return state, tensors

    def _board(self) -> Any:
        if self.out is None or not self.accelerator.is_main_process:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return SummaryWriter(str(self.out / "tensorboard"), purge_step=self.done + 1)


def cosine_rate(lr: float, warmup: float, steps: int, step: int) -> float:
    """Return the learning rate of a step counted from 0: a linear rise, then a cosine to zero.

    Args:
        lr: The peak.
        warmup: Share of the steps in which the rate rises.
        steps: Steps in all.
        step: Which one.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return lr * (step + 1) / rising
    return lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def packed_arguments(model: PreTrainedModel, lengths: list[int], device: torch.device) -> dict[str, Tensor]:
    """Return what tells a decoder that a row holds documents of these lengths: nothing for a single one.

    Raises:
        NotImplementedError: If the model has sliding-window layers.
    """
    if len(lengths) == 1:
        return {}
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if any(kind != "full_attention" for kind in kinds):
        raise NotImplementedError(
            "documents cannot be packed for a model with sliding-window layers: a window would reach into "
            "the document before; train on single windows of text instead (packing off)"
        )
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {
        "position_ids": positions.to(device),
        "attention_mask": torch.ones(1, len(positions[0]), dtype=torch.long, device=device),
    }


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as one piece; of a sharded one, all processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a value on a parameter's device and, where it has the parameter's shape, sharded like it."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter]
) -> Iterator[tuple[str, Tensor]]:
    """Yield an optimizer's state by name."""
    for name, parameter in named.items():
        for key, value in optimizer.state[parameter].items():
            yield f"optimizer.{name}.{key}", value


def restore_optimizer(
    optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Give an optimizer the state that `optimizer_tensors` named."""
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for name, parameter in named.items():
        prefix = f"optimizer.{name}."
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        optimizer.state[parameter] = {
            # Only a fused optimizer keeps its step counts on the device.
            key: value if key == "step" and not fused else like(value, parameter)
            for key, value in state.items()
        }


def make_accelerator(device_type: str) -> Accelerator:
    """Return Accelerate's view of the processes that a launcher started, for models on this device.

    Its state is one per process and refuses a CPU after a GPU; a single process needs no such choice.
    """
    launched = torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()
    return Accelerator(cpu=launched and device_type == "cpu")


def shard_layers(model: PreTrainedModel, root: nn.Module, accelerator: Accelerator) -> None:
    """Shard a model over the processes, a unit per layer, as Accelerate's FSDP2 plugin says.

    Args:
        model: The model; all parameters of a unit that are trained and those that are not stay so.
        root: The module whose forward pass runs everything: the rest of its parameters is one unit.
        accelerator: The processes.

    Raises:
        ValueError: If there is one process only.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if accelerator.num_processes < 2:
        raise ValueError("there is one process, nothing to shard over; start several by accelerate launch")
    plugin = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 else None
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    settings: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": plugin is None or bool(plugin.reshard_after_forward),
    }
    layers = model.get_decoder().layers
    assert isinstance(layers, nn.ModuleList)
    for layer in layers:
        fully_shard(layer, **settings)
    fully_shard(root, **settings)


def _documents(batch: Batch, least: int) -> list[Documents]:
    """Return of every row its documents: length, and whether it is long enough to learn from."""
    if isinstance(batch, Packed):
        return [[(n, n >= least) for n in row] for row in batch.lengths]
    if batch.ndim != 2 or not batch.size:
        raise ValueError(f"a batch must be [B, T] and not empty, got {list(batch.shape)}")
    return [[(batch.shape[1], True)]] * len(batch)


def _to_board(board: Any, report: dict[str, Any]) -> None:
    if board is None:
        return
    for name, value in report.items():
        if isinstance(value, float):
            board.add_scalar(name, value, report["step"])
