"""``seerattention distill``: from a model and some text to a folder of gates."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from seerattention.files import staged

#: Windows of held-out text that recall and perplexity are measured on.
HELDOUT_WINDOWS = 4

#: Densities of the report at the end.
DENSITIES = (0.2, 0.1, 0.05)

#: Needle documents of the report.
NEEDLES = 10


def run(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the base model.")],
    out: Annotated[Path, typer.Option(help="Folder for gates, checkpoint and metrics.")],
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
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 500,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    objective: Annotated[
        str, typer.Option(help="What gates minimise: sharp_kl, kl (published), or another of docs/method.md.")
    ] = "sharp_kl",
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    heldout: Annotated[
        list[Path] | None,
        typer.Option(help="Held-out text, as --text; default the end of the text, not trained on."),
    ] = None,
    eval_every: Annotated[int, typer.Option(help="Steps between measurements of held-out recall.")] = 50,
    early_stop: Annotated[
        int, typer.Option(help="Stop after this many measurements without a better recall; 0 never.")
    ] = 0,
    policy: Annotated[
        str, typer.Option(help="Policy saved with the gates, used where none is given.")
    ] = "top_k:0.1,sink_blocks=1,dense_last_rows=2",
    gate: Annotated[
        str, typer.Option(help='Gate design as JSON, e.g. {"k_sub_block": 16}; default the best known.')
    ] = "{}",
    seed: Annotated[int, typer.Option(help="Of the initial gates and the order of the text.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Precision of the base model: auto, float32, bfloat16.")
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; default the GPU if any, one per process.")
    ] = "",
    shard: Annotated[
        bool,
        typer.Option("--shard", help="Shard the base over the processes (FSDP2), if it fits no single GPU."),
    ] = False,
    push_to_hub: Annotated[str, typer.Option(help="Hub repository that gets the gates at the end.")] = "",
    dry_run: Annotated[bool, typer.Option(help="Print the plan, with one step timed, and stop.")] = False,
) -> None:
    """Teach gates to predict a model's own attention. Run again after a stop to continue where it was.

    Several GPUs: accelerate launch -m seerattention.cli distill ... (or torchrun).
    """
    import torch
    from rich.console import Console
    from transformers import AutoTokenizer

    from seerattention.cli._progress import show
    from seerattention.hosts.transformers import new_gates
    from seerattention.policies import parse
    from seerattention.train import DistillConfig, Distiller
    from seerattention.train.loop import make_accelerator

    parse(policy)
    settings = gate_settings(gate)
    config = DistillConfig(
        steps=steps, lr=lr, objective=objective, save_every=save_every, grad_accum=grad_accum,
        eval_every=eval_every, patience=early_stop,
    )  # fmt: skip
    if bool(text) == bool(dataset):
        raise ValueError("give training text by either --text or --dataset")
    if push_to_hub:
        _check_login()
    accelerator = make_accelerator(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not device and accelerator.num_processes > 1:
        device = str(accelerator.device)
    console = Console(quiet=not accelerator.is_main_process)
    base = load_base(model, dtype, device)
    tokenizer = AutoTokenizer.from_pretrained(model)
    _seed(seed)
    gates = new_gates(base, **settings)
    packed = bool(dataset) if packing is None else packing
    source = Source(text or [], dataset, split, packed, length, sequences, seed, heldout or [])
    batches, held, about = source.read(tokenizer, 4 * gates.config.block_size)
    _print_plan(console, base, model, gates, about, config, length, sequences, out)
    if dry_run:
        import copy

        probe = Distiller(
            base,
            copy.deepcopy(gates),
            batches,
            config,
            heldout=held,
            accelerator=accelerator,
            shard=shard or None,
        )
        took = probe.time_a_step()
        console.print(f"time        {took:.2f} s for one step, about {took * steps / 3600:.2f} h in all")
        return
    trainer = Distiller(
        base, gates, batches, config, out=out, heldout=held, accelerator=accelerator, shard=shard or None
    )
    if trainer.done:
        console.print(f"continuing after step {trainer.done}")
    show(trainer, console)
    if dropped := getattr(batches, "dropped", 0):
        console.print(f"dropped {dropped:,} documents of fewer than 4 blocks")
    report = _report(trainer, tokenizer, held, about)
    _print_report(console, report)
    if accelerator.is_main_process:
        _finish(console, gates, report, out / "gates", policy, push_to_hub)
    accelerator.wait_for_everyone()
    accelerator.end_training()


@dataclass(frozen=True)
class Source:
    """Where text comes from, as the options of commands say."""

    text: list[Path]
    dataset: str
    split: str
    packed: bool
    length: int
    sequences: int
    seed: int
    heldout: list[Path]

    def read(self, tokenizer: Any, least: int) -> tuple[Any, list[np.ndarray], str]:
        """Return batches, held-out windows and a line about both."""
        from seerattention.train import Packs, TextWindows, dataset_documents, read_tokens, text_documents

        if self.length < least:
            raise ValueError(f"--length {self.length} is below 4 blocks, {least} tokens; give a longer one")
        if self.dataset:
            if not self.packed:
                raise ValueError("--dataset is streamed, so it is always packed; leave out --no-packing")
            documents = dataset_documents(self.dataset, tokenizer, split=self.split)
            skipped, held, said = 0, self._given(tokenizer), "given"
            if not len(held):
                skipped, held = self._first(documents())
                said = f"the first {skipped} documents, not trained on"
            batches = Packs(
                lambda: itertools.islice(documents(), skipped, None), self.length, self.sequences, least
            )
            size = f"{self.dataset}, streamed"
        else:
            # An end token inside a chat is no end of a document: its bounds are kept as they are read.
            parts = list(text_documents(self.text, tokenizer)()) if self.packed else []
            tokens = np.concatenate(parts) if parts else read_tokens(self.text, tokenizer)
            size, held, said = f"{len(tokens):,} tokens", self._given(tokenizer), "given"
            if not len(held):
                if len(tokens) < 2 * self.length:
                    raise ValueError(
                        f"the text has {len(tokens)} tokens, fewer than one sequence of {self.length} to "
                        "train on and one held out; give more text or a shorter --length"
                    )
                windows = min(HELDOUT_WINDOWS, max(1, len(tokens) // 10 // self.length))
                tokens, held = np.split(tokens, [len(tokens) - windows * self.length])
                said = "the end of the text, not trained on"
            batches = TextWindows(tokens, self.length, self.sequences, self.seed)
            if self.packed:
                ends = np.cumsum([len(part) for part in parts])
                parts = np.split(tokens, ends[ends < len(tokens)])
                batches = Packs(lambda: parts, self.length, self.sequences, least)
        windows = min(HELDOUT_WINDOWS, len(held) // self.length)
        if not windows:
            raise ValueError(
                f"the held-out text has {len(held)} tokens, fewer than one sequence of "
                f"{self.length}; give more"
            )
        # The first batch is read here, so that text nobody can learn from is refused before any work.
        batches(0)
        return batches, list(held[: windows * self.length].reshape(windows, -1)), f"{size}; held out: {said}"

    def _given(self, tokenizer: Any) -> np.ndarray:
        from seerattention.train import read_tokens

        return read_tokens(self.heldout, tokenizer) if self.heldout else np.empty(0, np.int64)

    def _first(self, documents: Any) -> tuple[int, np.ndarray]:
        parts: list[np.ndarray] = []
        for document in documents:
            parts.append(document)
            if sum(map(len, parts)) >= HELDOUT_WINDOWS * self.length:
                break
        if not parts:
            raise ValueError(f"the dataset {self.dataset} has no rows in split {self.split!r}")
        return len(parts), np.concatenate(parts)


def _print_plan(
    console: Any,
    base: Any,
    name: str,
    gates: Any,
    about: str,
    config: Any,
    length: int,
    sequences: int,
    out: Path,
) -> None:
    from seerattention.ops.score_blocks import SLICE_BYTES

    count = sum(p.numel() for p in gates.parameters())
    weights = sum(p.numel() * p.element_size() for p in base.parameters())
    blocks = -(-length // gates.config.block_size)
    # Target, scores, their logarithm and gradients; slices of sub-block scores with their gradients; pools
    # and summaries in fp32, rotated and not, with gradients.
    c = gates.config
    pooled = c.num_heads * len(c.q_pool) / c.q_sub + c.num_kv_heads * len(c.k_pool) / c.k_sub
    summaries = c.num_heads / c.q_sub + c.num_kv_heads / c.k_sub
    maps = 8 * 4 * c.num_heads * blocks**2 + 5 * SLICE_BYTES
    maps += int(4 * length * (pooled * c.head_dim + 5 * summaries * c.dim))
    size, about = about.split("; ", 1)
    console.print(
        f"base model  {name}: {sum(p.numel() for p in base.parameters()) / 1e6:.1f} M parameters, frozen, "
        f"{base.dtype} on {base.device}\n"
        f"gates       {count / 1e6:.2f} M parameters in {len(gates.layers)} layers, blocks of "
        f"{gates.config.block_size} tokens\n"
        f"text        {size}; {config.steps} steps of {sequences} x {length:,} read "
        f"{config.steps * sequences * length:,}; {about}\n"
        f"memory      at most about {(weights + 16 * count + maps) / 2**30:.1f} GB beside the forward pass's "
        f"own: base {weights / 2**30:.1f}, gates and optimizer {16 * count / 2**30:.1f}, one layer's maps "
        f"{maps / 2**30:.1f} per sequence\n"
        f"output      {out}",
        highlight=False,
    )


def _report(trainer: Any, tokenizer: Any, held: list[np.ndarray], about: str) -> dict[str, Any]:
    """Measure recall, perplexity and needles on held-out text, dense beside sparse."""
    report: dict[str, Any] = {
        "text": about,
        "heldout_tokens": sum(map(len, held)),
        "steps": trainer.done,
        "recall": dict(zip(map(str, DENSITIES), trainer.heldout_recall(DENSITIES), strict=True)),
    }
    if trainer.sharded:
        report["skipped"] = "perplexity and needles: the base is sharded; measure them on one process"
        return report
    from seerattention.hosts.transformers import attach, detach
    from seerattention.measure.needle import NeedleTask
    from seerattention.measure.perplexity import perplexity
    from seerattention.measure.retrieval import retrieval

    tokens, length, model = np.concatenate(held), len(held[0]), trainer.model
    documents: list[Any] = []
    try:
        task = NeedleTask(tokenizer, tokens)
        documents = [task.make(length, seed) for seed in range(NEEDLES)]
    except ValueError as error:
        report["skipped"] = f"needles: {error}"

    def measure() -> dict[str, float]:
        values = {"perplexity": perplexity(model, tokens, window=length, windows=len(held))}
        return values | ({"needles": retrieval(model, documents)} if documents else {})

    report["dense"] = measure()
    for density in DENSITIES:
        attach(model, trainer.gates, f"top_k:{density},sink_blocks=1", min_tokens=0)
        try:
            report[f"top_k:{density}"] = measure()
        finally:
            detach(model)
    return report


def _print_report(console: Any, report: dict[str, Any]) -> None:
    from rich.table import Table

    dense = report.get("dense", {})
    table = Table("density", "recall", "perplexity", "needles", title="held-out text, no dense last rows")

    def cells(row: dict[str, float]) -> list[str]:
        found = []
        for key, form in (("perplexity", ".3f"), ("needles", ".2f")):
            value = row.get(key)
            delta = "" if value is None or row is dense else f" ({value - dense[key]:+{form}})"
            found.append("-" if value is None else f"{value:{form}}{delta}")
        return found

    table.add_row("dense", "1.000", *cells(dense))
    for density in DENSITIES:
        recall = report["recall"][str(density)]
        table.add_row(f"{density:.0%}", f"{recall:.3f}", *cells(report.get(f"top_k:{density}", {})))
    console.print(table)
    if "skipped" in report:
        console.print(f"not measured: {report['skipped']}", highlight=False)


def _check_login() -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        HfApi().whoami()
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        raise ValueError("--push-to-hub needs a login with write access: run `hf auth login`") from error


def _finish(
    console: Any, gates: Any, report: dict[str, Any], folder: Path, policy: str, repository: str
) -> None:
    """Save the gates and the report, and push them where asked."""
    from huggingface_hub import HfApi

    from seerattention.hosts.transformers import save_gates
    from seerattention.hosts.transformers.checkpoint import RESULTS

    save_gates(gates, folder, policy=policy)
    with staged(folder) as temporary:
        (temporary / RESULTS).write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"the gates are in {folder}", highlight=False)
    if repository:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
        console.print(f"and in https://huggingface.co/{repository}", highlight=False)


def gate_settings(gate: str) -> dict[str, Any]:
    """Read the option ``--gate``.

    Raises:
        ValueError: If it is no JSON object.
    """
    try:
        settings = json.loads(gate)
    except json.JSONDecodeError as error:
        raise ValueError(
            f'--gate must be a JSON object such as {{"k_sub_block": 16}}, got {gate!r} ({error})'
        ) from error
    if not isinstance(settings, dict):
        raise ValueError(f"--gate must be a JSON object, got {gate!r}")
    return settings


def load_base(model: str, dtype: str, device: str, config: Any = None) -> Any:
    """Load a base model onto a device, as the options of commands say, with another configuration if given.

    Raises:
        ValueError: If the precision or the device is not known or not there.
    """
    import torch
    from transformers import AutoModelForCausalLM

    known = ("auto", "float32", "bfloat16", "float16")
    if dtype not in known:
        raise ValueError(f"--dtype must be one of {', '.join(known)}, got {dtype!r}")
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(place)
    except RuntimeError as error:
        raise ValueError(f"--device {place!r} is not a device: {error}") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {place} was asked for, but torch sees no GPU; use --device cpu")
    more = {} if config is None else {"config": config}
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **more)
    # Quantised weights are where they were loaded.
    if not getattr(base, "is_quantized", False):
        base.to(target)  # type: ignore[arg-type]
    return base.eval()


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)
