"""``seerattention finetune``: a model and its gates learn together, also to read further than before."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from seerattention.cli.distill import Source, gate_settings, load_base
from seerattention.files import staged


def run(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the base model.")],
    out: Annotated[Path, typer.Option(help="Folder for the model, its gates, checkpoint and metrics.")],
    gates: Annotated[
        Path | None,
        typer.Option(
            help="Folder of distilled gates to start from; default new ones, see --warmup-gate-steps."
        ),
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Training text: .txt, .jsonl or a folder; repeatable.")
    ] = None,
    dataset: Annotated[
        str, typer.Option(help="Instead of --text: a Hugging Face dataset, id or id:configuration, streamed.")
    ] = "",
    split: Annotated[str, typer.Option(help="Split of --dataset.")] = "train",
    packing: Annotated[
        bool | None,
        typer.Option(
            "--packing/--no-packing",
            help="Pack whole documents, attention restarting at each, instead of random windows of the "
            "text; default only for --dataset.",
        ),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 8192,
    sequences: Annotated[int, typer.Option(help="Sequences per step, over all processes.")] = 1,
    grad_accum: Annotated[int, typer.Option(help="Passes per step on each process.")] = 1,
    steps: Annotated[int, typer.Option(help="Joint optimizer steps.")] = 400,
    warmup_gate_steps: Annotated[
        int, typer.Option(help="Steps before those in which the gates alone learn, from dense attention.")
    ] = 0,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the model.")] = 1e-5,
    gate_lr: Annotated[float, typer.Option(help="Peak learning rate of the gates.")] = 3e-3,
    weight_decay: Annotated[float, typer.Option(help="Of the model's matrices.")] = 0.0,
    gate_weight: Annotated[float, typer.Option(help="Factor of the gates' loss; 0 leaves them.")] = 10.0,
    density: Annotated[
        str,
        typer.Option(
            help="Fraction of the causal blocks that is read, e.g. 0.1; or a range, e.g. 0.1:0.5, one drawn "
            "per step so that the gates serve all of it; 1 is dense."
        ),
    ] = "0.1",
    dense_share: Annotated[
        float, typer.Option(help="Share of the steps over which density falls from 1 to --density.")
    ] = 0.0,
    soft_gates: Annotated[
        bool,
        typer.Option(
            "--soft-gates",
            help="Let the text's loss reach the gates too, through the logits of the blocks they choose; "
            "short sequences only, on the reference backend.",
        ),
    ] = False,
    temperature: Annotated[float, typer.Option(help="Of --soft-gates, in units of gate scores.")] = 1.0,
    lora: Annotated[
        int, typer.Option(help="Train LoRA adapters of this rank, merged at the end; 0 trains all weights.")
    ] = 0,
    gates_only: Annotated[
        bool, typer.Option("--gates-only", help="Train the gates alone, on text read sparsely.")
    ] = False,
    rope_type: Annotated[
        str, typer.Option(help="Read further by RoPE scaling: yarn, linear, dynamic or llama3.")
    ] = "",
    rope_factor: Annotated[float, typer.Option(help="How many times as far as the model reads now.")] = 1.0,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for a second forward pass.")
    ] = False,
    backend: Annotated[
        str, typer.Option(help="Backend of block-sparse attention; default the fastest.")
    ] = "auto",
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    heldout: Annotated[
        list[Path] | None,
        typer.Option(help="Held-out text, as --text; default the end of the text, not trained on."),
    ] = None,
    policy: Annotated[
        str, typer.Option(help="Policy saved with the gates; default top_k at the least --density.")
    ] = "",
    gate: Annotated[
        str,
        typer.Option(help='Design of new gates as JSON, e.g. {"k_sub_block": 16}; default the best known.'),
    ] = "{}",
    seed: Annotated[
        int, typer.Option(help="Of new gates, adapters, densities and the order of the text.")
    ] = 0,
    dtype: Annotated[
        str, typer.Option(help="Precision of products and of what is saved: auto, float32, bfloat16.")
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; default the GPU if any, one per process.")
    ] = "",
    shard: Annotated[
        bool,
        typer.Option("--shard", help="Shard the model over the processes (FSDP2), if it fits no single GPU."),
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Print the plan, with one step timed, and stop.")] = False,
) -> None:
    """Train a model through the blocks that its gates choose, and the gates with it.

    Ends with a model that plain transformers loads and gates for it. Run again after a stop to continue
    where it was. Several GPUs: accelerate launch -m seerattention.cli finetune ... (or torchrun).
    """
    import torch
    from rich.console import Console
    from transformers import AutoTokenizer

    from seerattention.cli._progress import show
    from seerattention.hosts.transformers import load_gates, new_gates
    from seerattention.hosts.transformers.checkpoint import check_replaceable
    from seerattention.policies import parse
    from seerattention.train import FinetuneConfig, Finetuner
    from seerattention.train.loop import make_accelerator
    from seerattention.train.save import GATES

    least, most = _densities(density)
    policy = policy or f"top_k:{least:g},sink_blocks=1"
    parse(policy)
    settings = gate_settings(gate)
    check_replaceable(out / GATES)
    config = FinetuneConfig(
        steps=steps, lr=lr, gate_lr=gate_lr, weight_decay=weight_decay, gate_weight=gate_weight,
        density=(least, most), dense_share=dense_share, soft_gates=soft_gates, temperature=temperature,
        warmup_gate_steps=warmup_gate_steps, save_every=save_every, grad_accum=grad_accum, seed=seed,
    )  # fmt: skip
    if bool(text) == bool(dataset):
        raise ValueError("give training text by either --text or --dataset")
    accelerator = make_accelerator(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not device and accelerator.num_processes > 1:
        device = str(accelerator.device)
    console = Console(quiet=not accelerator.is_main_process)
    start = _Start(
        model, dtype, rope_type, rope_factor, length, lora, gates_only, gradient_checkpointing, seed
    )
    base, wrapped = start.load(device)
    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(seed)
    learned = load_gates(gates).float().to(base.device) if gates else new_gates(base, **settings)
    packed = bool(dataset) if packing is None else packing
    source = Source(text or [], dataset, split, packed, length, sequences, seed, heldout or [])
    batches, held, about = source.read(tokenizer, 4 * learned.config.block_size)
    tuner = Finetuner(
        wrapped,
        learned,
        batches,
        config,
        out=None if dry_run else out,
        accelerator=accelerator,
        shard=shard or None,
        backend=backend,
    )
    _print_plan(console, tuner, start, about, length, sequences, out)
    if dry_run:
        took = tuner.time_a_step()
        console.print(f"time        {took:.2f} s for one step, about {took * steps / 3600:.2f} h in all")
        return
    if tuner.done:
        console.print(f"continuing after step {tuner.done}")
    if (first := tuner.warm_up()) is not None:
        show(first, console, "gates alone")
    show(tuner, console, "joint")
    _finish(console, tuner, start, tokenizer, held, about, out, policy)
    accelerator.end_training()


def _densities(text: str) -> tuple[float, float]:
    """Read one density or a range."""
    try:
        numbers = [float(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise ValueError(f"--density must be a number such as 0.1 or a range such as 0.1:0.5, got {text!r}")
    return numbers[0], numbers[-1]


@dataclass(frozen=True)
class _Start:
    """The model before training, as the options say; the same whenever it is loaded."""

    model: str
    dtype: str
    rope_type: str
    rope_factor: float
    length: int
    lora: int
    gates_only: bool
    checkpointing: bool
    seed: int

    def load(self, device: str) -> tuple[Any, Any]:
        """Return the model on a device, and what its adapters made of it."""
        import torch
        from transformers import AutoConfig

        from seerattention.train import checkpoint_layers, extend_context, prepare

        config = AutoConfig.from_pretrained(self.model)
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        if self.rope_type:
            extend_context(config, self.rope_type, self.rope_factor, self.length)
        elif self.rope_factor != 1:
            raise ValueError(
                f"--rope-factor {self.rope_factor:g} needs --rope-type, such as yarn, to say how to scale"
            )
        elif positions is not None and positions < self.length:
            raise ValueError(
                f"the model reads {positions:,} tokens, --length asks for {self.length:,}; extend it by "
                f"--rope-type yarn --rope-factor {self.length / positions:g}, or give a shorter --length"
            )
        base = load_base(self.model, self.dtype, device, config)
        torch.manual_seed(self.seed)
        wrapped = prepare(base, lora=self.lora, gates_only=self.gates_only)
        if self.checkpointing:
            checkpoint_layers(base)
        return base, wrapped


def _print_plan(
    console: Any, tuner: Any, start: _Start, about: str, length: int, sequences: int, out: Path
) -> None:
    base, config = tuner.model, tuner.config
    trained = sum(p.numel() for p in tuner.named.values())
    kind = f"LoRA of rank {start.lora}" if start.lora else "all weights" if trained else "the gates alone"
    frozen = sum(p.numel() * p.element_size() for p in base.parameters() if not p.requires_grad)
    count = sum(p.numel() for p in tuner.gates.parameters())
    # Weight, gradient and two moments in fp32.
    learning = 16 * (trained + count)
    text = base.config.get_text_config()
    rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    least, most = config.density
    reads = f"{least:g}" if least == most else f"{least:g} to {most:g}, drawn per step,"
    fall = f", falling from 1 over {config.dense_share:.0%} of the steps" if config.dense_share else ""
    size, about = about.split("; ", 1)
    console.print(
        f"base model  {start.model}: {base.num_parameters() / 1e6:.1f} M parameters, {tuner.dtype} on "
        f"{tuner.device}; RoPE {rope}, reads {text.max_position_embeddings:,} tokens\n"
        f"trained     {kind}, {trained / 1e6:.2f} M parameters; gates {count / 1e6:.2f} M in "
        f"{len(tuner.gates.layers)} layers\n"
        f"steps       {config.warmup_gate_steps} of the gates alone, then {config.steps} joint, of "
        f"{sequences} x {length:,} tokens\n"
        f"attention   a density of {reads} on backend {tuner.backend}{fall}\n"
        f"text        {size}; {about}\n"
        f"memory      at least {(frozen + learning) / 2**30:.1f} GB beside the layers' activations: frozen "
        f"weights {frozen / 2**30:.1f}, trained ones with gradient and optimizer {learning / 2**30:.1f}\n"
        f"output      {out}",
        highlight=False,
    )


def _finish(
    console: Any,
    tuner: Any,
    start: _Start,
    tokenizer: Any,
    held: list[np.ndarray],
    about: str,
    out: Path,
    policy: str,
) -> None:
    """Save the model and its gates, and measure them, dense beside sparse."""
    from seerattention.train import save_finetuned
    from seerattention.train.save import GATES, MODEL

    folder = save_finetuned(
        tuner, out, policy=policy, tokenizer=tokenizer, rebuild=lambda: start.load("cpu")[1]
    )
    what = "the model is" if folder.name == MODEL else "the base is quantised, so the adapters alone are"
    console.print(f"{what} in {folder}, its gates in {out / GATES}", highlight=False)
    if tuner.sharded:
        console.print("not measured: the model is sharded; measure it on one process")
    elif tuner.accelerator.is_main_process:
        report = _report(tuner, held, about, sorted(set(tuner.config.density), reverse=True))
        _print_report(console, report)
        _keep(report, out / GATES)
    tuner.accelerator.wait_for_everyone()


def _report(tuner: Any, held: list[np.ndarray], about: str, densities: list[float]) -> dict[str, Any]:
    """Measure perplexity on held-out text, dense beside sparse."""
    from seerattention.hosts.transformers import attach, detach
    from seerattention.measure.perplexity import perplexity

    tokens, length, model = np.concatenate(held), len(held[0]), tuner.model
    model.eval()

    def measure() -> float:
        return perplexity(model, tokens, window=length, windows=len(held))

    report: dict[str, Any] = {"text": about, "heldout_tokens": len(tokens), "steps": tuner.done}
    report["perplexity"] = {"dense": measure()}
    for density in densities:
        attach(model, tuner.gates, f"top_k:{density:g},sink_blocks=1", min_tokens=0)
        try:
            report["perplexity"][f"top_k:{density:g}"] = measure()
        finally:
            detach(model)
    return report


def _print_report(console: Any, report: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("attention", "perplexity", title="held-out text, no dense last rows")
    for name, value in report["perplexity"].items():
        table.add_row(name, f"{value:.3f}")
    console.print(table)


def _keep(report: dict[str, Any], folder: Path) -> None:
    from seerattention.hosts.transformers.checkpoint import RESULTS

    with staged(folder) as temporary:
        (temporary / RESULTS).write_text(json.dumps(report, indent=2) + "\n")
