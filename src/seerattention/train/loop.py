"""What training does around its gradients: steps, metrics, checkpoints, resuming."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from seerattention.files import check_writable, locked, write_json
from seerattention.hosts.transformers import Gates, base_checksum
from seerattention.hosts.transformers.gates import infinite
from seerattention.hosts.transformers.tensor_parallel import refuse_learning
from seerattention.train import objectives
from seerattention.train.checkpoint import (
    FORMAT,
    optimizer_tensors,
    read_checkpoint,
    restore_optimizer,
    trim_metrics,
    write_checkpoint,
)
from seerattention.train.config import TrainConfig
from seerattention.train.processes import like, make_accelerator, summed, whole
from seerattention.train.share import Batch, Share, identity_of, length_of, share_of, tokens_of

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"
RUN = "run.json"


class Loop:
    """Steps until they are done, each on its own batch; a subclass leaves the gradients of a batch.

    Started by ``torchrun`` or ``accelerate launch``, every process takes an equal share of a step's
    sequences and gradients are summed over processes, so that the result does not depend on their number
    beyond rounding.

    Args:
        model: The model.
        gates: Its gates, trained in place.
        batches: The global batch of a step counted from 0, without padding; the same for the same step
            on every process, so that a resumed run continues exactly. The longest sequences are of
            ``batches.length`` tokens or, where it has none, as long as those of the first step.
        config: How to train.
        out: Folder for the checkpoint, ``metrics.jsonl``, ``run.json`` and, where tensorboard is
            installed, its logs; None keeps nothing. A checkpoint found there is continued, by any
            number of processes, and that of a finished run by one of more steps. Nothing is written before
            `run`, which is the only one that writes there.
        accelerator: The processes that share a step; default a new one, as the launcher set it up.
        shard: Shard the model over the processes with FSDP2; default where Accelerate's configuration
            says FSDP2, which it heeds on GPUs only.

    Attributes:
        dtype: Precision in which the model came.
        done: Steps done.
        saved: Steps done in the last checkpoint; 0 where there is none.
        first: Batches that were read before the first step.
        length: Tokens of the longest sequences.
        named: The model's parameters that are trained, by name.
        named_gates: The gates'.
        optimizer: Theirs; every group has its peak learning rate as ``peak``.
    """

    #: What `accumulate` returns, in words.
    measures: tuple[str, ...] = ()

    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        model: PreTrainedModel,
        gates: Gates,
        batches: Callable[[int], Batch],
        config: TrainConfig,
        out: Path | None,
        accelerator: Accelerator | None,
        shard: bool | None,
    ) -> None:
        refuse_learning(model)
        self.model, self.gates, self.batches, self.out = model, gates, batches, out
        self.config, self.dtype = config, model.dtype
        self.accelerator = accelerator or make_accelerator(str(model.device))
        self.sharded = bool(self.accelerator.is_fsdp2) if shard is None else shard
        self.objective = objectives.create(config.objective)
        self.done = self.saved = self.first = 0
        self.length = length_of(batches)
        self.named: dict[str, nn.Parameter] = {}
        gates.use_rotary_of(model)
        # Gates in use, and copies of them, ask for no gradient.
        gates.requires_grad_(True)
        self.named_gates = {f"gates.{n}": p for n, p in gates.named_parameters()}
        self._weights = self._text = ""
        if out is not None:
            if getattr(model, "is_quantized", False):
                # Four-bit layers lay their weights out anew in their first pass on a CPU, and are the same.
                with torch.no_grad():
                    tokens = torch.zeros(1, 1, dtype=torch.long, device=model.device)
                    model.get_decoder()(tokens, use_cache=False)
            self._weights, self._text = base_checksum(model), identity_of(batches)

    @property
    def finished(self) -> bool:
        """Whether there is no step left."""
        return self.done >= self.config.steps

    @property
    def device(self) -> torch.device:
        """Where the gates are."""
        return next(self.gates.parameters()).device

    def run(self) -> Iterator[Any]:
        """Train step by step, yielding after each; stopping the iteration in between loses nothing saved.

        Raises:
            FloatingPointError: If a loss or gradient is not finite, or a weight or an optimizer's state when
                it would be saved. The last checkpoint stays.
            RuntimeError: If a frozen model's weights are not what they were before.
            ValueError: If another process is writing to ``out``.
        """
        folder = self.out if self.accelerator.is_main_process else None
        with nullcontext() if folder is None else locked(folder, again=True):
            if folder is not None:
                trim_metrics(folder / METRICS, self.done)
                self._write_run()
            board = self._board()
            while not self.finished:
                report = self._step()
                if folder is not None:
                    with (folder / METRICS).open("a") as log:
                        log.write(json.dumps(asdict(report)) + "\n")
                    for name, value in asdict(report).items():
                        if board is not None and isinstance(value, float):
                            board.add_scalar(name, value, report.step)
                if self.done % self.config.save_every == 0 or self.finished:
                    self.save()
                yield report
            if board is not None:
                board.close()
            self._finish()

    def time_a_step(self) -> float:
        """Return the seconds of a forward and backward pass as at the end of training; nothing changes."""
        started = time.perf_counter()
        self.reduce(self.accumulate(self.batches(self.index), self.config.density_at(self.config.steps)))
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    @property
    def index(self) -> int:
        """Number of the batch that comes next."""
        return self.first + self.done

    @property
    def learned_parameters(self) -> int:
        """Parameters that are trained, those of gates and model together."""
        return sum(p.numel() for p in (*self.named.values(), *self.named_gates.values()))

    @property
    def steps_left(self) -> int:
        """Steps that remain."""
        return self.config.steps - self.done

    @property
    def measured_tokens(self) -> int:
        """Tokens that the remaining steps read besides those that are learned from."""
        return 0

    def seconds_left(self, tokens: int, seconds: float, after: int = 0) -> float:
        """Return about how long the remaining steps take, from what one of them took.

        Args:
            tokens: Tokens that a step reads, on all processes.
            seconds: What it took.
            after: Tokens read after the last step, on one process as held-out text is.
        """
        each = seconds / tokens * self.accelerator.num_processes
        return self.steps_left * seconds + (self.measured_tokens + after) * each

    def memory(self, length: int) -> dict[str, int]:
        """Estimate the bytes that training on sequences of a length takes, by what takes them."""
        raise NotImplementedError

    def accumulate(self, batch: Batch, density: float) -> Tensor:
        """Run this process's share of a batch; leave its gradients.

        Returns:
            fp32 ``[n]``, this share's part of the global ``measures``.
        """
        raise NotImplementedError

    def reduce(self, values: Tensor) -> tuple[list[float], list[float]]:
        """Sum values and gradients over processes; return the values, and the norms of model and gates."""
        if self.accelerator.num_processes > 1:
            # Gates are small: one message. The shards of a model are summed already.
            gates = _gradients(self.named_gates)
            flat = summed(self.accelerator, torch.cat([*(g.flatten() for g in gates), values.float()]))
            *parts, values = flat.split([*(g.numel() for g in gates), len(values)])
            for gradient, total in zip(gates, parts, strict=True):
                gradient.copy_(total.view_as(gradient))
            for gradient in [] if self.sharded else _gradients(self.named):
                gradient.copy_(summed(self.accelerator, gradient))
        norms = [_norm(named).to(values.device)[None] for named in (self.named, self.named_gates)]
        found = torch.cat([values.float(), *norms]).tolist()
        return found[: len(values)], found[len(values) :]

    def save(self) -> None:
        """Write a checkpoint now, where there is a folder for it: a run that stops here goes on from here.

        Raises:
            FloatingPointError: If something in it is not finite; the last checkpoint stays.
        """
        if self.out is None or self.saved >= self.done:
            return
        tensors = {}
        for name, tensor in self._tensors():
            # A sharded tensor is put together by all processes.
            tensor = whole(tensor.detach())
            if self.accelerator.is_main_process:
                tensors[name] = tensor.contiguous()
        if bad := infinite(tensors):
            raise self._not_finite(f"step {self.done} has made {bad[0]} infinite or NaN")
        if self.accelerator.is_main_process:
            write_checkpoint(self.out / CHECKPOINT, tensors, {**self._progress(), **self._identity()})
        self.saved = self.done
        self.accelerator.wait_for_everyone()

    def _step(self) -> Any:
        """Do one step and count it; return a dataclass of what it measured."""
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self.config.rate(self.done)
        self.optimizer.zero_grad(set_to_none=True)
        batch, density = self.batches(self.index), self.config.density_at(self.done)
        values, norms = self.reduce(self.accumulate(batch, density))
        self._check_finite([*values, *norms])
        self._clip(norms[0])
        self.optimizer.step()
        self.done += 1
        read = {"tokens": tokens_of(batch).size, "seconds": time.perf_counter() - started}
        return self._report(values, norms, density, read)

    def _report(self, values: list[float], norms: list[float], density: float, read: Any) -> Any:
        raise NotImplementedError

    def _clip(self, norm: float) -> None:
        """Do what a step does with its gradients before the optimizer uses them."""

    def _finish(self) -> None:
        """Do what comes after the last step."""

    def _check_finite(self, found: list[float]) -> None:
        """Raise before the optimizer spreads what is not finite."""
        if all(map(math.isfinite, found)):
            return
        names = (*self.measures, "norm", "gate norm")
        said = ", ".join(f"{name} {value:.4g}" for name, value in zip(names, found, strict=True))
        where = f"step {self.done + 1}, on batch {self.index} of the text,"
        raise self._not_finite(f"{where} has {said}; it changed nothing")

    def _not_finite(self, what: str) -> FloatingPointError:
        """Return the error, with what there is to go on from."""
        kept = ""
        if self.out is not None:
            last = f"; the checkpoint in {self.out} is of step {self.saved}"
            again = ", from where a run comes here again" if self.saved == self.done else ""
            kept = last + again if self.saved else "; there is no checkpoint yet"
        return FloatingPointError(
            f"{what}{kept}. Start again with a lower learning rate, or look at this batch"
        )

    def _share(self, batch: Batch) -> Share:
        """Return this process's part of a batch."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        return share_of(batch, self.gates.config.block_size, world, rank, self.config.grad_accum)

    def _identity(self) -> dict[str, Any]:
        """Return what a checkpoint must share with this run, as JSON types."""
        about = {
            "format": FORMAT,
            "config": asdict(self.config),
            "gate": self.gates.config.to_dict(),
            "base": self._weights,
            "dtype": str(self.dtype),
            "text": self._text,
            **self._about(),
        }
        return json.loads(json.dumps(about))

    def _about(self) -> dict[str, Any]:
        """Return what else a checkpoint must share with this run."""
        return {}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what a checkpoint holds, by name; every process must."""
        named = {**self.named, **self.named_gates}
        yield from named.items()
        yield from optimizer_tensors(self.optimizer, named)

    def _progress(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides tensors and identity, as JSON types."""
        return {"step": self.done}

    def _resume(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Continue from the checkpoint in ``out``; return its progress and tensors, if there is one.

        Raises:
            ValueError: If it is damaged or of another run.
        """
        if self.out is None:
            return None
        check_writable(self.out, folder=True)
        if not (self.out / CHECKPOINT).exists():
            return None
        named = {**self.named, **self.named_gates}
        shapes = {name: parameter.shape for name, parameter in named.items()}
        state, tensors = read_checkpoint(self.out / CHECKPOINT, self._identity(), self._progress(), shapes)
        self.done = self.saved = state["step"]
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(like(tensors[name], parameter))
        restore_optimizer(self.optimizer, named, tensors)
        return state, tensors

    def _write_run(self, **more: Any) -> None:
        """Write what ran, where there is a folder for it."""
        if self.out is not None and self.accelerator.is_main_process:
            report = {
                **self._identity(),
                "base_model": self.gates.base.to_dict(),
                "processes": self.accelerator.num_processes,
                "sharded": self.sharded,
                **more,
            }
            write_json(self.out / RUN, report)

    def _board(self) -> Any:
        if self.out is None or not self.accelerator.is_main_process:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return SummaryWriter(str(self.out / "tensorboard"), purge_step=self.done + 1)


def _gradients(named: dict[str, nn.Parameter]) -> list[Tensor]:
    """Return the gradients of parameters; zeros where this process has none, others may."""
    for parameter in named.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [p.grad for p in named.values() if p.grad is not None]


def _norm(named: dict[str, nn.Parameter]) -> Tensor:
    gradients = [p.grad for p in named.values() if p.grad is not None]
    return whole(torch.nn.utils.get_total_norm(gradients)).float() if gradients else torch.zeros(())
