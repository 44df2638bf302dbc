"""Joint training: a model learns to predict text through the blocks that its gates choose, gates with it."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from seerattention.hosts.transformers import Gates, attached, intercept
from seerattention.hosts.transformers.base import BaseInfo, fingerprint
from seerattention.hosts.transformers.intercept import unwrapped
from seerattention.train import DistillConfig, Distiller, objectives
from seerattention.train.config import FinetuneConfig, JointStep
from seerattention.train.data import Packed
from seerattention.train.joint import JointPass
from seerattention.train.language import IGNORED, LanguageLoss
from seerattention.train.loop import (
    Batch,
    Documents,
    Loop,
    Share,
    like,
    make_accelerator,
    optimizer_tensors,
    packed_arguments,
    restore_optimizer,
    shard_layers,
    whole,
)
from seerattention.train.prepare import training_backend


class Finetuner(Loop):
    """Trains a model through its own gates, and the gates with it.

    Whatever parameters of the model require a gradient are trained: all of them, those of LoRA adapters,
    or none (`prepare`). They are kept in fp32; where the model came in 16 bits, products run in bfloat16.
    Several processes share a step and their gradients are summed; with FSDP2 the model is sharded by layer.

    Args:
        model: The model, also wrapped by PEFT; trained in place.
        gates: Its gates, trained in place.
        batches: See `Distiller`; the steps that warm up the gates come first.
        config: How to train.
        out: Folder for the checkpoint, metrics and ``run.json``; ``warmup`` in it has those of the gates'
            own steps. None keeps nothing. A checkpoint found there is continued.
        accelerator: Default a new one, as the launcher set it up.
        shard: Shard the model over the processes with FSDP2; default where Accelerate's configuration
            says FSDP2.
        backend: Of `block_sparse_attention`.

    Raises:
        ValueError: If the backend has no backward, the settings contradict each other, or a checkpoint is
            damaged or of another run.
        OSError: If ``out`` cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        gates: Gates,
        batches: Callable[[int], Batch],
        config: FinetuneConfig | None = None,
        *,
        out: Path | None = None,
        accelerator: Accelerator | None = None,
        shard: bool | None = None,
        backend: str = "auto",
    ) -> None:
        self.config: FinetuneConfig = config or FinetuneConfig()
        base: PreTrainedModel = unwrapped(model)
        accelerator = accelerator or make_accelerator(base.device.type)
        super().__init__(batches, self.config, out, accelerator)
        self.model, self.gates = base, gates
        self.wrapped = model
        self.objective = objectives.create(self.config.objective)
        self.device = base.device
        #: Precision in which the model came, and in which it is saved.
        self.dtype = base.dtype
        trained = {name: p for name, p in base.named_parameters() if p.requires_grad}
        self._refuse(base, trained)
        self.backend = training_backend(
            base, gates.config.block_size, backend, trained=bool(trained), soft=self.config.soft_gates
        )
        self._about = {
            "base": fingerprint(base),
            "rope": getattr(base.config.get_text_config(), "rope_parameters", None),
            "trained": hashlib.sha256("\n".join(sorted(trained)).encode()).hexdigest()[:16],
        }
        gates.use_rotary_of(base)
        for parameter in trained.values():
            parameter.data = parameter.data.float()
        found = None
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            found = self._saved(out)
        if found is not None:
            self._load(found[1], trained)
        self.sharded = bool(accelerator.is_fsdp2) if shard is None else shard
        self.language = LanguageLoss(base)
        if self.sharded:
            self._shard()
        self.named = {f"model.{n}": p for n, p in base.named_parameters() if p.requires_grad}
        self.named_gates = {f"gates.{n}": p for n, p in gates.named_parameters()}
        self.optimizer = self._make_optimizer()
        if found is not None:
            restore_optimizer(self.optimizer, {**self.named, **self.named_gates}, found[1])
        if out is not None:
            self._write_run(out, sharded=self.sharded, base_model=gates.base.to_dict())
        self._warm_up: Distiller | None = None

    def _refuse(self, base: PreTrainedModel, trained: dict[str, nn.Parameter]) -> None:
        """Refuse what cannot be trained, before any work."""
        if attached(base):
            raise ValueError("gates are attached to this model; detach(model) first, they are given apart")
        if dropout := getattr(base.config.get_text_config(), "attention_dropout", 0.0):
            raise ValueError(
                f"the model has attention dropout ({dropout}), which blocks cannot be read with; set "
                "attention_dropout to 0 in its config.json"
            )
        repeats = any(getattr(part, "gradient_checkpointing", False) for part in base.modules())
        if self.config.soft_gates and repeats:
            raise ValueError(
                "soft gates keep the maps of all layers for the backward pass, which gradient checkpointing "
                "would repeat; use one of them"
            )
        if different := self.gates.base.differences(BaseInfo.of(base)):
            raise ValueError(
                f"these gates were made for {self.gates.base.name or 'another model'}: "
                f"{'; '.join(different)}; distil gates for this one, or start from new ones"
            )
        if not trained and not self.config.soft_gates and not self.config.gate_weight:
            raise ValueError(
                "no parameter of the model requires a gradient and gate_weight is 0, so nothing would "
                "learn; call prepare(model), or give the gates a weight"
            )

    def _shard(self) -> None:
        from torch.distributed.fsdp import register_fsdp_forward_method

        shard_layers(self.model, self.language, self.accelerator)
        register_fsdp_forward_method(self.language, "decode")

    def _make_optimizer(self) -> torch.optim.AdamW:
        # One tensor at a time, without fusing, on a CPU: the same result on every run.
        how: dict[str, Any] = {"fused": True} if self.device.type == "cuda" else {"foreach": False}
        matrices = [p for p in self.named.values() if p.dim() > 1]
        vectors = [p for p in self.named.values() if p.dim() <= 1]
        lr = {"lr": self.config.lr, "peak": self.config.lr}
        gate_lr = {"lr": self.config.gate_lr, "peak": self.config.gate_lr}
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": self.config.weight_decay, **lr},
            {"params": vectors, "weight_decay": 0.0, **lr},
            {"params": list(self.named_gates.values()), "weight_decay": 0.0, **gate_lr},
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, betas=(0.9, 0.95), **how)

    def warm_up(self) -> Distiller | None:
        """Return what trains the gates alone before the joint steps; None where that is done."""
        if self.done or not self.config.warmup_gate_steps:
            return None
        if self._warm_up is None:
            config = DistillConfig(
                steps=self.config.warmup_gate_steps,
                lr=self.config.gate_lr,
                save_every=self.config.save_every,
                objective=self.config.objective,
                grad_accum=self.config.grad_accum,
            )
            self.model.eval()
            self._warm_up = Distiller(
                self.model,
                self.gates,
                self.batches,
                config,
                out=None if self.out is None else self.out / "warmup",
                accelerator=self.accelerator,
                shard=False,
                decoder=self._decode,
            )
        return None if self._warm_up.finished else self._warm_up

    def run(self) -> Iterator[JointStep]:
        """Train step by step, after the gates' own steps if those are not done; yield after each.

        Raises:
            FloatingPointError: If a loss is not finite. Weights and gates keep their last good values and
                the last checkpoint stays.
        """
        if (first := self.warm_up()) is not None:
            for _ in first.run():
                pass
        yield from super().run()

    def time_a_step(self) -> float:
        """Return the seconds of a joint step's forward and backward pass; nothing changes."""
        started = time.perf_counter()
        self.model.train()
        least = self.config.density[0]
        self._reduce(self._accumulate(self.batches(self.done), self.done, least))
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    def trained_tensors(self) -> dict[str, Tensor]:
        """Return the trained parameters by name, whole, on the main process; all processes must ask."""
        found = {}
        for name, parameter in self.named.items():
            value = whole(parameter.detach())
            if self.accelerator.is_main_process:
                found[name.removeprefix("model.")] = value
        return found

    def _decode(self, tokens: Tensor, **kwargs: Any) -> Any:
        with self._precision():
            return self.language.decode(tokens, **kwargs)

    def _precision(self) -> torch.autocast:
        half = self.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)

    def _step(self) -> JointStep:
        started = time.perf_counter()
        index = self.config.warmup_gate_steps + self.done
        batch, density = self.batches(index), self.config.density_at(self.done)
        tokens = batch.tokens if isinstance(batch, Packed) else batch
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self.config.rate(self.done)
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()
        values, (norm, gate_norm) = self._reduce(self._accumulate(batch, index, density))
        loss, gate_loss, recall = values
        self._check_finite(
            index, {"loss": loss, "gate loss": gate_loss, "norm": norm, "gate norm": gate_norm}
        )
        _clip(self.named, norm, self.config.clip)
        self.optimizer.step()
        self.done += 1
        seconds = time.perf_counter() - started
        if not (self.config.gate_weight or self.config.soft_gates):
            gate_loss = recall = None
        return JointStep(self.done, loss, gate_loss, recall, density, norm, gate_norm, tokens.size, seconds)

    def _check_finite(self, batch: int, values: dict[str, float]) -> None:
        """Raise before the optimizer spreads what is not finite."""
        if all(math.isfinite(value) for value in values.values()):
            return
        kept = ""
        if self.out is not None:
            last = f"the checkpoint in {self.out} is of step {self.saved}"
            kept = f"; {last}" if self.saved else "; there is no checkpoint yet"
        found = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        raise FloatingPointError(
            f"step {self.done + 1}, on batch {batch} of the text, has {found}; it changed nothing{kept}. "
            "Lower the learning rate or look at this batch"
        )

    def _accumulate(self, batch: Batch, index: int, density: float) -> Tensor:
        """Run this process's share of a batch; leave gradients in model and gates.

        Returns:
            fp32 ``[3]``, this share's part of the global loss, gate loss and recall.
        """
        share = self._share(batch, self.gates.config.block_size)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            # Random numbers are those of the step, whatever came before: a resumed run draws the same.
            seed = self.config.seed, index, self.accelerator.process_index
            torch.manual_seed(int(np.random.default_rng(seed).integers(2**62)))
            totals = [self._forward(*one, share, density) for one in share.passes]
        return torch.stack(totals).sum(0)

    def _forward(self, tokens: Tensor, documents: Documents, share: Share, density: float) -> Tensor:
        """Run the model once, forward and backward."""
        joint = JointPass(
            dict(self.gates.items()), documents, share, density, self.objective, self.config, self.backend
        )
        lengths = [length for length, _ in documents]
        more = packed_arguments(self.model, lengths, self.device)
        targets = _next_tokens(tokens, documents)
        learns = bool(self.named) or self.config.soft_gates
        with torch.set_grad_enabled(learns), intercept(self.model, joint):
            with self._precision():
                loss = self.language(tokens.to(self.device), targets.to(self.device), **more)
            loss = loss / share.predicted
            total = torch.stack([loss, *joint.losses]).sum()
            # FSDP2 divides gradients by the number of processes; here parts add up.
            if total.requires_grad:
                (total * (self.accelerator.num_processes if self.sharded else 1)).backward()
        return torch.cat([loss.detach()[None].float(), joint.values(self.device)])

    def _reduce(self, values: Tensor) -> tuple[list[float], list[float]]:
        """Sum values and gradients over processes; return the values, and the norms of model and gates."""
        if self.accelerator.num_processes > 1:
            values = self._sum(values)
            for name, parameter in {**self.named, **self.named_gates}.items():
                if self.sharded and name in self.named:
                    continue
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.copy_(self._sum(parameter.grad))
        norms = [_norm(named) for named in (self.named, self.named_gates)]
        found = torch.cat([values, *(norm.to(values.device)[None] for norm in norms)]).tolist()
        return found[: len(values)], found[len(values) :]

    def _sum(self, tensor: Tensor) -> Tensor:
        summed = self.accelerator.reduce(tensor, "sum")
        assert isinstance(summed, Tensor)
        return summed

    def _settings(self) -> dict[str, Any]:
        about = {"config": asdict(self.config), "gate": self.gates.config.to_dict(), **self._about}
        return json.loads(json.dumps(about))

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        named = {**self.named, **self.named_gates}
        yield from named.items()
        yield from optimizer_tensors(self.optimizer, named)

    @torch.no_grad()
    def _load(self, tensors: dict[str, Tensor], trained: dict[str, nn.Parameter]) -> None:
        for name, parameter in trained.items():
            parameter.copy_(like(tensors[f"model.{name}"], parameter))
        for name, parameter in self.gates.named_parameters():
            parameter.copy_(tensors[f"gates.{name}"])


def _next_tokens(tokens: Tensor, documents: Documents) -> Tensor:
    """Return the token behind each, ``IGNORED`` at the end of documents and in those not learned from."""
    targets = torch.full_like(tokens, IGNORED)
    start = 0
    for length, counts in documents:
        if counts:
            targets[:, start : start + length - 1] = tokens[:, start + 1 : start + length]
        start += length
    return targets


def _clip(named: dict[str, nn.Parameter], norm: float, most: float) -> None:
    """Scale gradients of this norm down to ``most``."""
    if norm > most:
        for parameter in named.values():
            if parameter.grad is not None:
                parameter.grad.mul_(most / norm)


def _norm(named: dict[str, nn.Parameter]) -> Tensor:
    gradients = [p.grad for p in named.values() if p.grad is not None]
    return whole(torch.nn.utils.get_total_norm(gradients)).float() if gradients else torch.zeros(())
