"""Joint training: a model learns to predict text through the blocks that its gates choose, gates with it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from seerattention.hosts.transformers import BaseInfo, Gates, attached, intercept
from seerattention.hosts.transformers.base import unwrapped
from seerattention.hosts.transformers.family import full_attention_layers
from seerattention.train.config import DistillConfig, FinetuneConfig, JointStep
from seerattention.train.distiller import Distiller
from seerattention.train.joint import JointPass
from seerattention.train.language import IGNORED, LanguageLoss
from seerattention.train.loop import Loop
from seerattention.train.processes import shard_layers, whole
from seerattention.train.share import Batch, Documents, Share, decoder_arguments
from seerattention.train.trained import training_backend


class Finetuner(Loop):
    """Trains a model through its own gates, and the gates with it.

    Whatever parameters of the model require a gradient are trained: all of them, those of LoRA adapters,
    or none (`prepare`). They are kept in fp32; where the model came in 16 bits, products run in bfloat16.
    Several processes share a step and their gradients are summed; with FSDP2 the model is sharded by layer.

    Args: those of `Loop`, and
        model: The model, also wrapped by PEFT; trained in place.
        batches: The steps that warm up the gates come first.
        out: ``warmup`` in it has what belongs to the gates' own steps.
        backend: Of `block_sparse_attention`.

    Raises:
        ValueError: If the backend has no backward, the settings contradict each other, or a checkpoint is
            damaged or of another run.
        OSError: If ``out`` cannot be written.
    """

    measures = ("loss", "gate loss", "recall")

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
        config = config or FinetuneConfig()
        base: PreTrainedModel = unwrapped(model)
        trained = {name: p for name, p in base.named_parameters() if p.requires_grad}
        _refuse(base, gates, config, bool(trained))
        self.backend = training_backend(
            base, gates.config.block_size, backend, trained=bool(trained), soft=config.soft_gates
        )
        super().__init__(base, gates, batches, config, out, accelerator, shard)
        self.config: FinetuneConfig = config
        self.wrapped = model
        self.first = config.warmup_gate_steps
        for parameter in trained.values():
            parameter.data = parameter.data.float()
        self.language = LanguageLoss(base)
        if self.sharded:
            from torch.distributed.fsdp import register_fsdp_forward_method

            shard_layers(base, self.language, self.accelerator)
            register_fsdp_forward_method(self.language, "decode")
        self.named = {f"model.{n}": p for n, p in base.named_parameters() if p.requires_grad}
        # One tensor at a time, without fusing, on a CPU: the same result on every run.
        how: dict[str, Any] = {"fused": True} if self.device.type == "cuda" else {"foreach": False}
        self.optimizer = torch.optim.AdamW(self._groups(), betas=(0.9, 0.95), **how)
        self._resume()
        self._warm_up: Distiller | None = None

    def _groups(self) -> list[dict[str, Any]]:
        """Return what is trained, by rate and decay."""
        c, own = self.config, self.named.values()
        groups = (
            ([p for p in own if p.dim() > 1], c.lr, c.weight_decay),
            ([p for p in own if p.dim() <= 1], c.lr, 0.0),
            (list(self.named_gates.values()), c.gate_lr, 0.0),
        )
        return [{"params": p, "lr": lr, "peak": lr, "weight_decay": decay} for p, lr, decay in groups if p]

    @property
    def steps_left(self) -> int:
        """Steps that remain, those of the gates alone among them where they come first."""
        return super().steps_left + (0 if self.done else self.config.warmup_gate_steps)

    def warm_up(self) -> Distiller | None:
        """Return what trains the gates alone before the joint steps; None where that is done."""
        if self.done or not self.config.warmup_gate_steps:
            return None
        if self._warm_up is None:
            config = DistillConfig(
                steps=self.config.warmup_gate_steps,
                lr=self.config.gate_lr,
                objective=self.config.objective,
                target=self.config.target,
                save_every=self.config.save_every,
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
                # The joint steps have no gaps either.
                reach=self.length,
                decoder=self._decode,
            )
        return self._warm_up

    def run(self) -> Iterator[JointStep]:
        """Train as `Loop.run`, after the gates' own steps if those are not done."""
        if (first := self.warm_up()) is not None:
            for _ in first.run():
                pass
        yield from super().run()

    def _finish(self) -> None:
        if self.config.gate_weight or self.config.soft_gates:
            self.gates.reach = self.length

    def memory(self, length: int) -> dict[str, int]:
        """Return what weights and optimizer take; the layers' activations come on top."""
        parameters = list(self.model.parameters())
        return {
            "frozen weights": sum(p.numel() * p.element_size() for p in parameters if not p.requires_grad),
            # Weight, gradient and two moments in fp32.
            "trained ones with gradient and optimizer": 16 * self.learned_parameters,
        }

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

    def _report(self, values: list[float], norms: list[float], density: float, read: Any) -> JointStep:
        loss, *rest = values
        gate_loss, recall = rest if self.config.gate_weight or self.config.soft_gates else (None, None)
        return JointStep(self.done, loss, gate_loss, recall, density, norms[0], norms[1], **read)

    def _clip(self, norm: float) -> None:
        """Scale the model's gradients down to the norm that they may have."""
        if norm > self.config.clip:
            for parameter in self.named.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.config.clip / norm)

    def accumulate(self, batch: Batch, density: float) -> Tensor:
        """Run this process's share of a batch; leave gradients in model and gates."""
        share = self._share(batch)
        self.model.train()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            # Random numbers are those of the step, whatever came before: a resumed run draws the same.
            seed = self.config.seed, self.index, self.accelerator.process_index
            torch.manual_seed(int(np.random.default_rng(seed).integers(2**62)))
            totals = [self._forward(*one, share, density) for one in share.passes]
        return torch.stack(totals).sum(0)

    def _forward(self, tokens: Tensor, documents: Documents, share: Share, density: float) -> Tensor:
        """Run the model once, forward and backward."""
        joint = JointPass(
            dict(self.gates.items()), documents, share, density, self.objective, self.config, self.backend
        )
        positions = [torch.arange(length) for length, _ in documents]
        more = decoder_arguments(self.model, positions, len(tokens), self.device)
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

    def _about(self) -> dict[str, Any]:
        names = sorted(name.removeprefix("model.") for name in self.named)
        return {
            "rope": getattr(self.model.config.get_text_config(), "rope_parameters", None),
            "trained": hashlib.sha256("\n".join(names).encode()).hexdigest()[:16],
        }


def _refuse(base: PreTrainedModel, gates: Gates, config: FinetuneConfig, trained: bool) -> None:
    """Refuse what cannot be trained, before any work."""
    if attached(base):
        raise ValueError("gates are attached to this model; detach(model) first, they are given apart")
    if dropout := getattr(base.config.get_text_config(), "attention_dropout", 0.0):
        raise ValueError(
            f"the model has attention dropout ({dropout}), which blocks cannot be read with; set "
            "attention_dropout to 0 in its config.json"
        )
    repeats = any(getattr(part, "gradient_checkpointing", False) for part in base.modules())
    if config.soft_gates and repeats:
        raise ValueError(
            "soft gates keep the maps of all layers for the backward pass, which gradient checkpointing "
            "would repeat; use one of them"
        )
    if different := gates.base.differences(BaseInfo.of(base)):
        raise ValueError(
            f"these gates were made for {gates.base.name or 'another model'}: "
            f"{'; '.join(different)}; distil gates for this one, or start from new ones"
        )
    if gates.shared(full_attention_layers(base)):
        raise ValueError(
            "these gates serve several layers each, and a model is trained with a gate for every layer; "
            "start from gates with layers_per_gate 1, or from new ones"
        )
    if gates.config.phase != "prefill":
        raise ValueError(
            f"these gates are for phase {gates.config.phase}, and a model is trained with gates for prefill; "
            "leave gate.phase out, and distil gates for decoding afterwards"
        )
    if not trained and not config.soft_gates and not config.gate_weight:
        raise ValueError(
            "no parameter of the model requires a gradient and gate_weight is 0, so nothing would "
            "learn; call prepare(model), or give the gates a weight"
        )


def _next_tokens(tokens: Tensor, documents: Documents) -> Tensor:
    """Return the token behind each, ``IGNORED`` at the end of documents and in those not learned from."""
    targets = torch.full_like(tokens, IGNORED)
    start = 0
    for length, counts in documents:
        if counts:
            targets[:, start : start + length - 1] = tokens[:, start + 1 : start + length]
        start += length
    return targets
