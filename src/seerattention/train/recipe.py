"""All that a training run is told, as one set of settings: what ``config.toml`` in its folder repeats.

The help of a command lists them, so that what is heavy is imported inside the functions here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from seerattention.files import check_writable, write_whole
from seerattention.gate_config import GateConfig
from seerattention.settings import flat, read, to_toml
from seerattention.train.config import DistillConfig, FinetuneConfig, TrainConfig
from seerattention.train.source import Source, Text

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from seerattention.hosts.transformers import Gates
    from seerattention.train.distiller import Distiller
    from seerattention.train.finetuner import Finetuner
    from seerattention.train.loop import Loop

#: The settings of a run, in its folder.
SETTINGS = "config.toml"

#: Settings of gates that their model gives.
SHAPE = ("num_heads", "num_kv_heads", "head_dim")

Trainer = TypeVar("Trainer", bound="Loop")


@dataclass
class Run(Generic[Trainer]):
    """A run that is ready to go.

    Attributes:
        trainer: Its loop, after the steps that a checkpoint has.
        text: What it reads.
        tokenizer: The model's.
        rebuild: Makes the model again on the CPU as it was before training.
    """

    trainer: Trainer
    text: Text
    tokenizer: PreTrainedTokenizerBase
    rebuild: Callable[[], nn.Module]


@dataclass(frozen=True, kw_only=True)
class Recipe(Generic[Trainer]):
    """What both trainings are told; `settings.build` makes one, `start` goes on from there.

    Attributes:
        model: Hub id or folder of the base model.
        source: The text.
        policy: Policy saved with the gates, used in prefill where none is given.
        gates: Folder or hub id of gates to start from; default new ones.
        gate: Table of the design of new gates, see `GateConfig`.
        seed: Of new gates and the order of the text.
        dtype: Precision of the base model, and of what is saved of it: auto, float32, bfloat16, float16.
        device: cpu, cuda, cuda:1, ...; default the GPU if any, one per process.
        shard: Shard the model over the processes (FSDP2), if it fits no single GPU.
        report: Measure the gates at the end, on held-out text and on needles in words that the model answers.
    """

    model: str
    source: Source
    config: TrainConfig
    policy: str = ""
    gates: str = ""
    gate: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    dtype: str = "auto"
    device: str = ""
    shard: bool = False
    report: bool = True

    def start(self, out: Path | None) -> Run[Trainer]:
        """Load model and text and make the trainer.

        Args:
            out: The run's folder, which gets `SETTINGS`; a checkpoint in it is continued. None keeps nothing.

        Raises:
            OSError: If something cannot be read or written.
            ValueError: If the settings contradict each other or the checkpoint.
        """
        import torch

        from seerattention.hosts.transformers import load_gates, new_gates
        from seerattention.hosts.transformers.checkpoint import check_replaceable
        from seerattention.hosts.transformers.load import load_tokenizer
        from seerattention.policies import parse
        from seerattention.train.data import text_files
        from seerattention.train.processes import make_accelerator
        from seerattention.train.save import ADAPTER, GATES, MODEL
        from seerattention.train.share import LEAST_BLOCKS

        parse(self.policy)
        if self.gates and self.gate:
            raise ValueError("gates have their design; leave gate out, or gates to start from new ones")
        text_files((*self.source.text, *self.source.heldout))
        if out is not None:
            check_replaceable(out / GATES)
            for name in (MODEL, ADAPTER, GATES):
                check_writable(out / name, folder=True)
        accelerator = make_accelerator(self.device)
        device = self.device or (str(accelerator.device) if accelerator.num_processes > 1 else "")
        base, wrapped = self.load(device)
        tokenizer = load_tokenizer(self.model)
        torch.manual_seed(self.seed)
        given = load_gates(self.gates).float().to(base.device) if self.gates else None
        gates = given or new_gates(base, **self.new())
        self.choose_policies(gates)
        text = self.mixed(self.source.read(tokenizer, LEAST_BLOCKS * gates.config.block_size), tokenizer)
        trainer = self.kind()(
            wrapped, gates, text.batches, self.config, out=out, accelerator=accelerator,
            shard=self.shard or None, **self.more(text),
        )  # fmt: skip
        if out is not None and trainer.done and (out / SETTINGS).exists():
            before = read(out / SETTINGS).get("gates", "")
            if before != self.gates:
                raise ValueError(
                    f"{out} holds a training that starts from {before or 'new gates'}, not from "
                    f"{self.gates or 'new ones'}; go on with the same gates, or give another folder"
                )
        if out is not None and accelerator.is_main_process:
            settings = self if self.gates else replace(self, gate=_design(gates.config))
            written = to_toml(flat(settings))
            write_whole(out / SETTINGS, lambda path: path.write_text(written, encoding="utf-8"))
        return Run(trainer, text, tokenizer, lambda: self.load("cpu")[1])

    def kind(self) -> Callable[..., Trainer]:
        """Return the trainer's class."""
        raise NotImplementedError

    def new(self) -> dict[str, Any]:
        """Return what `new_gates` is told."""
        return self.gate

    def load(self, device: str) -> tuple[PreTrainedModel, nn.Module]:
        """Return the model on a device as it is before training, and what adapters made of it."""
        from seerattention.hosts.transformers import load_base

        base = load_base(self.model, dtype=self.dtype, device=device)
        return base, base

    def mixed(self, text: Text, tokenizer: PreTrainedTokenizerBase) -> Text:
        """Return the text as this training reads it."""
        return text

    def choose_policies(self, gates: Gates) -> None:
        """Give gates the policies that are saved with them, or refuse these."""

    def more(self, text: Text) -> dict[str, Any]:
        """Return what this trainer takes besides what all do."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Distillation(Recipe["Distiller"]):
    """Gates for a frozen model.

    Attributes:
        decode_policy: Policy saved with gates whose gate.phase is decode or both, used in decoding.
        layers_per_gate: Layers behind one another that read what the gate of the first chose.
        reach: Up to which position gates are taught, by gaps in the positions of a sequence; default all
            that the model has, length for no gaps.
        share_text: Let all processes share every sequence, if it is longer than one GPU takes.
        retrieval: Share of the sequences that state things and ask for them, made from the text.
        repeats: Share of the sequences in which passages of the text return.
        eight_bits: Held-out recall that gates for prefill may lose to be saved with scores in eight bits,
            which Hopper GPUs multiply faster. Tried at the end on such a GPU; negative: never.
        seed: Of new gates, gaps, the order of the text and what is made of it.
    """

    config: DistillConfig = field(default_factory=DistillConfig)
    policy: str = "top_k:0.1,sink_blocks=1,dense_last_rows=2"
    decode_policy: str = "token_budget:2048,sink_blocks=1"
    layers_per_gate: int = 1
    reach: int | None = None
    share_text: bool = False
    retrieval: float = 0.25
    repeats: float = 0.1
    eight_bits: float = 0.002

    def __post_init__(self) -> None:
        from seerattention.train.mixture import check_shares

        check_shares(self.retrieval, self.repeats)
        if self.gates and self.layers_per_gate != 1:
            raise ValueError(
                "gates have their layers; leave layers_per_gate out, or gates to start from new ones"
            )

    def kind(self) -> type[Distiller]:
        """Return the trainer's class."""
        from seerattention.train.distiller import Distiller

        return Distiller

    def new(self) -> dict[str, Any]:
        """Return what `new_gates` is told."""
        return {**self.gate, "layers_per_gate": self.layers_per_gate}

    def load(self, device: str) -> tuple[PreTrainedModel, nn.Module]:
        """Return the model, twice, once its configuration says that the reach can be had."""
        from seerattention.hosts.transformers.load import load_config
        from seerattention.train.positions import Reach

        Reach.of(load_config(self.model), self.source.length, self.reach)
        return super().load(device)

    def mixed(self, text: Text, tokenizer: PreTrainedTokenizerBase) -> Text:
        """Return the text with sequences in which something must be looked up."""
        from seerattention.train.mixture import Mixture

        if self.retrieval == self.repeats == 0:
            return text
        assert not isinstance(text.batches, Mixture)
        mixture = Mixture(text.batches, tokenizer, self.retrieval, self.repeats, self.seed)
        made = f"{self.retrieval:.0%} made into questions, {self.repeats:.0%} with returning passages"
        return replace(text, batches=mixture, size=f"{text.size}, {made}")

    def choose_policies(self, gates: Gates) -> None:
        """Give gates a policy for each of their phases."""
        from seerattention.policies import check_decodes, parse

        phases = gates.config.phases
        if "decode" in phases:
            check_decodes(parse(self.decode_policy), gates.config.block_size)
        gates.policy = self.policy if "prefill" in phases else None
        gates.decode_policy = self.decode_policy if "decode" in phases else None

    def more(self, text: Text) -> dict[str, Any]:
        """Return the held-out text, on which the best gates are found, and how far they are taught."""
        return {
            "heldout": text.heldout,
            "reach": self.reach,
            "seed": self.seed,
            "share_text": self.share_text,
        }


@dataclass(frozen=True, kw_only=True)
class Finetuning(Recipe["Finetuner"]):
    """A model and its gates together.

    Attributes:
        policy: Policy saved with the gates; default top_k at the least density.
        gates: Folder or hub id of gates to start from; default new ones, see warmup_gate_steps.
        seed: Of new gates, adapters, drawn densities, dropout and the order of the text.
        lora: Rank of LoRA adapters, merged at the end; 0 trains all weights.
        gates_only: Train the gates alone, on text read sparsely.
        rope_type: Read further by RoPE scaling: yarn, linear, dynamic or llama3.
        rope_factor: How many times as far as the model reads now.
        gradient_checkpointing: Less memory for a second forward pass.
        backend: Of block-sparse attention.
    """

    config: FinetuneConfig = field(default_factory=FinetuneConfig)
    lora: int = 0
    gates_only: bool = False
    rope_type: str = ""
    rope_factor: float = 1.0
    gradient_checkpointing: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        if not self.policy:
            object.__setattr__(self, "policy", f"top_k:{self.config.densities[0]:g},sink_blocks=1")

    def kind(self) -> type[Finetuner]:
        """Return the trainer's class."""
        from seerattention.train.finetuner import Finetuner

        return Finetuner

    def load(self, device: str) -> tuple[PreTrainedModel, nn.Module]:
        """Return the model on a device as it is before training, and what adapters made of it."""
        import torch

        from seerattention.hosts.transformers import load_base
        from seerattention.hosts.transformers.load import load_config
        from seerattention.train.trained import checkpoint_layers, extend_context, prepare

        config, length = load_config(self.model), self.source.length
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        if self.rope_type:
            extend_context(config, self.rope_type, self.rope_factor, length)
        elif self.rope_factor != 1:
            raise ValueError(
                f"rope_factor {self.rope_factor:g} needs rope_type, such as yarn, to say how to scale"
            )
        elif positions is not None and positions < length:
            raise ValueError(
                f"the model reads {positions:,} tokens, length asks for {length:,}; extend it by rope_type "
                f"yarn and rope_factor {length / positions:g}, or give a shorter length"
            )
        base = load_base(self.model, dtype=self.dtype, device=device, config=config)
        torch.manual_seed(self.seed)
        wrapped = prepare(base, lora=self.lora, gates_only=self.gates_only)
        if self.gradient_checkpointing:
            checkpoint_layers(base)
        return base, wrapped

    def more(self, text: Text) -> dict[str, Any]:
        """Return the backend."""
        return {"backend": self.backend}


def _design(config: GateConfig) -> dict[str, Any]:
    """Return what `new_gates` made these gates of: TOML has no null.

    None of a setting whose default is another is a number; where None is the default, it is left out.
    """
    whole = {"q_sub_block": config.q_sub, "k_sub_block": config.k_sub}
    design = {**config.to_dict(), **whole}
    return {name: value for name, value in design.items() if name not in SHAPE and value is not None}
