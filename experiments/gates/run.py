"""Compare gate designs, objectives and data on the bundled teacher: many variants trained at once.

All variants of a process learn inside the same frozen forward pass; evaluation runs beside them in further
processes, which take what is ready from a queue of files. Whatever is finished is in ``--out``, even if the
run is cut short.

python -m experiments.gates.run prepare --books books.tar.xz --heldout heldout.tar.xz --tokens runs/tokens
python -m experiments.gates.run run --groups experiments/gates/final.json --tokens runs/tokens
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.teacher.data import Mixture, tokenise
from experiments.teacher.gates import Batches
from experiments.variants import cost
from seerattention import baselines
from seerattention.gate_config import GateConfig, design_of
from seerattention.hosts.transformers import (
    AttentionCall,
    base_checksum,
    intercept,
    load_gates,
    new_gates,
    save_gates,
)
from seerattention.measure import bundled
from seerattention.measure.compare import measured
from seerattention.measure.needle import NeedleTask
from seerattention.measure.versions import versions
from seerattention.ops.options import Pool
from seerattention.ops.pooled_attention import pooled_attention
from seerattention.ops.score_blocks import chunked
from seerattention.train import DistillConfig, objectives, target_recall
from seerattention.train.layer import gate_scores
from seerattention.train.target import counted

RECIPE = Path(__file__).parents[1] / "teacher" / "recipe.toml"
POLICY = "top_k:{},sink_blocks=1"
SCORERS = ("oracle", "oracle_mass", "xattention", "quest", "meanpool", "streaming", "random")

#: Steps between two lines of a training log.
LOG_EVERY = 25


@dataclass(frozen=True)
class Variant:
    """One set of gates to train.

    Attributes:
        name: What results call it.
        gate: Fields of `GateConfig`.
        objective: Name of an objective.
        options: What the objective takes.
        lr: Peak learning rate.
        target: What is learned of a block.
    """

    name: str
    gate: dict[str, Any] = field(default_factory=dict)
    objective: str = "kl"
    options: dict[str, Any] = field(default_factory=dict)
    lr: float = 1e-3
    target: Pool = "max"


@dataclass(frozen=True)
class Group:
    """Variants of one process, which see the same data.

    Attributes:
        variants: Trained at once.
        shares: Of needle documents and of windows with returning passages.
        seed: Of the data and of the gates' initial noise; default ``--seed``.
    """

    variants: tuple[Variant, ...]
    shares: dict[str, float] = field(default_factory=lambda: {"needles": 0.6, "repeats": 0.1})
    seed: int | None = None


class Together:
    """Trains several gates of one frozen model in one forward pass per step.

    What one variant gets is what `Distiller` would give it alone: its own loss and gradient in every
    layer, its own optimizer, the same batches.

    Args:
        model: The base model.
        variants: What to train.
        steps: Optimizer steps.
        seed: Of the gates' initial noise, the same for each.
    """

    def __init__(self, model: Any, variants: tuple[Variant, ...], steps: int, seed: int) -> None:
        self.model = model
        self.steps = steps
        self.variants = variants
        self.configs = [DistillConfig(steps=steps, lr=v.lr) for v in variants]
        self.objectives = [objectives.create(v.objective, **v.options) for v in variants]
        self.gates = []
        for variant in variants:
            torch.manual_seed(seed)
            self.gates.append(new_gates(model, **variant.gate))
        how = {"fused": True} if model.device.type == "cuda" else {"foreach": False}
        self.optimizers = [
            torch.optim.AdamW(g.parameters(), lr=v.lr, betas=(0.9, 0.95), weight_decay=0.0, **how)
            for g, v in zip(self.gates, variants, strict=True)
        ]

    def run(
        self, batches: Callable[[int], np.ndarray], seconds: float = float("inf")
    ) -> Iterator[dict[str, Any]]:
        """Train, yielding loss and recall now and then.

        Args:
            batches: Tokens of a step, int64 ``[B, T]``.
            seconds: Time to be finished in: the learning rate then follows the clock where it is ahead
                of the steps, and there are fewer of them.
        """
        started = time.perf_counter()
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(batches, 0)
            step, place = 0, 0.0
            while place < self.steps:
                tokens = torch.from_numpy(coming.result())
                coming = ahead.submit(batches, step + 1)
                for optimizer, config in zip(self.optimizers, self.configs, strict=True):
                    for group in optimizer.param_groups:
                        group["lr"] = config.lr * config.rate(place)  # type: ignore[arg-type]
                    optimizer.zero_grad(set_to_none=True)
                step += 1
                elapsed = time.perf_counter() - started
                # Whole steps without a limit, so that the rates are those of one trainer alone.
                place = step if seconds == float("inf") else max(step, elapsed / seconds * self.steps)
                log = step % LOG_EVERY == 1 or place >= self.steps
                losses, recalls = self._accumulate(tokens.to(self.model.device), log)
                for optimizer in self.optimizers:
                    optimizer.step()
                if log:
                    yield {
                        "step": step,
                        "tokens": list(tokens.shape),
                        "seconds": round(time.perf_counter() - started, 2),
                        "variants": {
                            v.name: {"loss": round(loss, 5), "recall": round(recall, 5)}
                            for v, loss, recall in zip(self.variants, losses, recalls, strict=True)
                        },
                    }

    def _accumulate(self, tokens: Tensor, log: bool) -> tuple[list[float], list[float]]:
        """Run the frozen model once, leaving gradients in all gates; return mean losses and recalls."""
        by_layer = [dict(gates.items()) for gates in self.gates]
        losses: list[list[Tensor]] = [[] for _ in self.gates]
        recalls: list[list[float]] = [[] for _ in self.gates]

        def learn(call: AttentionCall) -> Tensor:
            size, length = by_layer[0][call.layer].block_size, call.q.shape[2]
            out, targets = call.q, {}
            for pool in {v.target for v in self.variants}:
                options = {"scale": call.scale, "pool": pool}
                out, targets[pool], _ = pooled_attention(call.q, call.k, call.v, size, **options)
            positions = torch.arange(length, device=call.q.device)
            for i, (layers, objective) in enumerate(zip(by_layer, self.objectives, strict=True)):
                target = targets[self.variants[i].target]
                with torch.enable_grad():
                    scores = gate_scores(layers[call.layer], call.q_nope, call.k_nope, positions)["prefill"]
                    loss = objective(*counted(target, scores, size, length))
                    loss.backward()
                if log:
                    losses[i].append(loss.detach())
                    recalls[i].append(target_recall(target, scores.detach(), size, length, 0.1))
            return out

        with torch.no_grad(), intercept(self.model, learn):
            self.model.get_decoder()(tokens, use_cache=False)
        if not log:
            return [], []
        return (
            [float(torch.stack(x).mean()) for x in losses],
            [sum(x) / len(x) for x in recalls],
        )


def write(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def folder_name(name: str) -> str:
    """Return a name as a folder's."""
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in name)


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return the teacher on the device, and its tokenizer."""
    torch.set_float32_matmul_precision("high")
    torch.set_num_threads(args.threads)
    if args.device == "cuda":
        # Memory is plenty: fewer, larger products.
        chunked.SLICE_BYTES = 2**30
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model, tokenizer = bundled.load_teacher(dtype, args.teacher)
    return model.to(args.device), tokenizer


def train(args: argparse.Namespace) -> None:
    """Train the variants of one group and save them; then help to evaluate."""
    model, tokenizer = load(args)
    group = chosen(args)[args.group]
    books = np.load(args.tokens / "books.npy", mmap_mode="r")
    digits = tomllib.loads(RECIPE.read_text())["data"]["digits"]
    settings = {"lengths": args.lengths, "tokens": args.batch, **group.shares}
    before = base_checksum(model)
    seed = args.seed if group.seed is None else group.seed
    together = Together(model, group.variants, args.steps, seed)
    rows = []
    for row in together.run(Batches(Mixture(books, tokenizer, digits), settings, seed), args.seconds):
        rows.append(row)
        report = {"group": args.group, "shares": group.shares, "seed": seed, "rows": rows}
        write(args.out / "training" / f"{args.group}.json", report)
        print(
            f"{args.group}: step {row['step']}, {row['seconds']} s, "
            + ", ".join(f"{n} {v['loss']:.3f}/{v['recall']:.3f}" for n, v in row["variants"].items()),
            flush=True,
        )
    assert base_checksum(model) == before, "the base model changed"
    for variant, gates in zip(group.variants, together.gates, strict=True):
        save_gates(
            gates.bfloat16(), args.out / "gates" / folder_name(variant.name), policy=POLICY.format(0.1)
        )
    del together
    evaluate(args, model, tokenizer)


def evaluate(args: argparse.Namespace, model: Any = None, tokenizer: Any = None) -> None:
    """Measure whatever is ready and not taken by another process, until everything is."""
    if model is None:
        model, tokenizer = load(args)
    heldout = np.load(args.tokens / "heldout.npy", mmap_mode="r")
    task = NeedleTask(tokenizer, heldout)
    documents = {n: [task.make(n, seed) for seed in range(args.documents)] for n in args.eval_lengths}
    trained = [v.name for g in chosen(args).values() for v in g.variants]
    left = [(name, n) for name in ("dense", *args.scorers, *trained) for n in args.eval_lengths]
    while left:
        ready = [
            (name, n)
            for name, n in left
            if name not in trained or (args.out / "gates" / folder_name(name) / "config.json").exists()
        ]
        for name, n in ready:
            left.remove((name, n))
            if claim(args.out, f"{name} {n}"):
                measure(args, model, name, name in trained, documents[n], heldout, n)
                break
        else:
            failed = {path.name for path in (args.out / "failed").glob("*")}
            left = [(name, n) for name, n in left if folder_name(name) not in failed]
            time.sleep(0.2)


def claim(out: Path, what: str) -> bool:
    """Take a piece of work; False if another process has."""
    path = out / "claims" / folder_name(what)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def measure(
    args: argparse.Namespace,
    model: Any,
    name: str,
    trained: bool,
    documents: list[Any],
    heldout: np.ndarray,
    length: int,
) -> None:
    """Measure one method at one length and all densities; writes after each."""
    rows = []
    scorer: Any = None
    if trained:
        # As users load them, in the weights' bfloat16, where the kernels are; a CPU is faster in float32.
        scorer = load_gates(args.out / "gates" / folder_name(name))
        scorer = scorer if args.device == "cuda" else scorer.float()
    elif name != "dense":
        scorer = baselines.create(name)
    windows = heldout[: max(1, args.text_tokens // length) * length].reshape(-1, length)
    for density in args.densities if scorer is not None else [1.0]:
        started = time.perf_counter()
        found = measured(
            model, scorer, POLICY.format(density), windows=list(windows), documents=documents
        ).values()
        rows.append(
            {
                "method": name,
                "tokens": length,
                "asked": density,
                "density": round(found["density"], 4),
                "needle": round(found["needles"], 4),
                "perplexity": round(found["perplexity"], 4),
                "seconds": round(time.perf_counter() - started, 2),
            }
        )
        write(args.out / "results" / f"{folder_name(name)}-{length}.json", rows)


def collect(args: argparse.Namespace) -> dict[str, Any]:
    """Gather what is finished into ``report.json``."""
    rows = [r for f in sorted((args.out / "results").glob("*.json")) for r in json.loads(f.read_text())]
    base = json.loads((args.teacher / "config.json").read_text())
    shape = {
        "num_heads": base["num_attention_heads"],
        "num_kv_heads": base["num_key_value_heads"],
        "head_dim": base["head_dim"],
    }
    variants = [
        {
            **asdict(v),
            "group": name,
            "shares": g.shares,
            "seed": args.seed if g.seed is None else g.seed,
            "cost_32k": round(cost(GateConfig.from_dict(design_of({**shape, **v.gate}))), 5),
        }
        for name, g in chosen(args).items()
        for v in g.variants
    ]
    settings = {k: v for k, v in vars(args).items() if k != "main" and not isinstance(v, Path)}
    training = [json.loads(f.read_text()) for f in sorted((args.out / "training").glob("*.json"))]
    report = {
        "versions": versions(),
        "settings": {k: str(v) if v == float("inf") else v for k, v in settings.items()},
        "questions": 8 * args.documents,
        "variants": variants,
        "training": training,
        "rows": rows,
    }
    write(args.out / "report.json", report)
    return report


def table(report: dict[str, Any]) -> str:
    """Return perplexity, gap to the oracle against XAttention's, and needles, one line per method."""
    cell = {(r["method"], r["tokens"], r["asked"]): r for r in report["rows"]}
    known = {v["name"]: v["cost_32k"] for v in report["variants"]}
    densities, lengths = report["settings"]["densities"], report["settings"]["eval_lengths"]
    lines = [
        "perplexity (gap to the oracle / XAttention's) and needles, at " + ", ".join(map(str, densities))
    ]
    for length in lengths:
        lines.append(f"-- {length} tokens")
        for name in ("dense", *SCORERS, *known):
            parts = []
            for density in [1.0] if name == "dense" else densities:
                row = cell.get((name, length, density))
                best, rival = (cell.get((n, length, density)) for n in ("oracle", "xattention"))
                gap = ""
                if row and best and rival and rival["perplexity"] != best["perplexity"]:
                    gap = (row["perplexity"] - best["perplexity"]) / (
                        rival["perplexity"] - best["perplexity"]
                    )
                    gap = f" {gap:5.2f}"
                parts.append(
                    f"{row['perplexity']:7.3f}{gap} {row['needle']:.3f}" if row else "      -     -     -"
                )
            price = f"{known[name]:6.2%}" if name in known else "      "
            lines.append(f"{name:28}{price} | " + " | ".join(parts))
    return "\n".join(lines)


def chosen(args: argparse.Namespace) -> dict[str, Group]:
    """Return the groups asked for, with the variants asked for."""
    groups = {
        name: Group(
            tuple(Variant(**v) for v in group["variants"]),
            **{key: group[key] for key in ("shares", "seed") if key in group},
        )
        for name, group in json.loads(args.groups.read_text()).items()
    }
    kept = {}
    for name, group in groups.items():
        variants = tuple(v for v in group.variants if args.only is None or v.name in args.only)
        if variants:
            kept[name] = replace(group, variants=variants)
    return kept


def check(groups: dict[str, Group]) -> None:
    """Refuse objectives that are not there, as those that lost, before any work."""
    for variant in (v for group in groups.values() for v in group.variants):
        try:
            objectives.create(variant.objective, **variant.options)
        except ValueError as error:
            sys.exit(f"error: {variant.name}: {error}; choose others by --only")


def run(args: argparse.Namespace) -> None:
    """Start one process per group and some for evaluation, wait, and print the table."""
    if (args.out / "claims").exists():
        sys.exit(f"error: {args.out} holds another run; give another folder or delete it")
    for name in ("books.npy", "heldout.npy"):
        if not (args.tokens / name).exists():
            sys.exit(f"error: {args.tokens} holds no {name}; make it with `experiments.gates.run prepare`")
    groups = chosen(args)
    check(groups)
    started = time.perf_counter()
    (args.out / "logs").mkdir(parents=True, exist_ok=True)
    processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(role: str, label: str, *more: str) -> None:
        command = [sys.executable, "-m", "experiments.gates.run", role, *sys.argv[2:], *more]
        with (args.out / "logs" / f"{label}.txt").open("wb") as log:
            processes[label] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    for name in groups:
        start("train", name, "--group", name)
    for i in range(args.evaluators):
        start("evaluate", f"evaluator-{i}")
    try:
        while any(p.poll() is None for p in processes.values()):
            for name, process in processes.items():
                if name in groups and process.poll():
                    for variant in groups[name].variants:
                        (args.out / "failed").mkdir(exist_ok=True)
                        (args.out / "failed" / folder_name(variant.name)).touch()
            if time.perf_counter() - started > args.deadline:
                print(f"stopped after {args.deadline:.0f} s", flush=True)
                break
            time.sleep(1)
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.terminate()
        for process in processes.values():
            process.wait()
        report = collect(args)
    for label, process in processes.items():
        text = (args.out / "logs" / f"{label}.txt").read_text(errors="replace").splitlines()
        if process.returncode > 0:
            print(f"{label} failed:", *text[-15:], sep="\n")
        elif text:
            print(text[-1][:200])
    print(table(report))
    print(f"{time.perf_counter() - started:.0f} s; everything is in {args.out}")


def prepare(args: argparse.Namespace) -> None:
    """Tokenise books once, as uint16."""
    _, tokenizer = bundled.load_teacher()
    for name, sources in (("books", args.books), ("heldout", args.heldout)):
        tokens = tokenise(sources, tokenizer, args.tokens / f"{name}.npy")
        print(f"{name}: {len(tokens):,} tokens, {tokens.nbytes / 1e6:.1f} MB")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("prepare", help="tokenise the texts")
    make.add_argument("--books", type=Path, nargs="+", required=True, help="for training")
    make.add_argument("--heldout", type=Path, nargs="+", required=True, help="for evaluation only")
    make.add_argument("--tokens", type=Path, default=Path("runs/tokens"), help="default: %(default)s")
    make.set_defaults(main=prepare)
    for function, text in (
        (run, "train and measure everything"),
        (train, "one process of a run"),
        (evaluate, "one process of a run"),
    ):
        p = commands.add_parser(function.__name__, help=text)
        p.add_argument("--tokens", type=Path, required=True, help="folder made by prepare")
        p.add_argument("--out", type=Path, default=Path("runs/design"), help="default: %(default)s")
        p.add_argument(
            "--teacher", type=Path, default=bundled.TEACHER, help="folder of a model like the bundled one"
        )
        p.add_argument(
            "--scorers", nargs="*", default=SCORERS, help="to compare with (default: all of %(default)s)"
        )
        p.add_argument("--steps", type=int, default=600)
        p.add_argument("--seconds", type=float, default=float("inf"), help="most a training may take")
        p.add_argument(
            "--deadline", type=float, default=float("inf"), help="most the run may take, in seconds"
        )
        p.add_argument("--batch", type=int, default=16384, help="tokens per step (default: %(default)s)")
        p.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384], help="of training, in turn")
        p.add_argument("--eval-lengths", type=int, nargs="+", default=[8192, 16384])
        p.add_argument("--densities", type=float, nargs="+", default=[0.2, 0.1, 0.05])
        p.add_argument("--documents", type=int, default=13, help="needle documents, 8 questions each")
        p.add_argument("--text-tokens", type=int, default=131072, help="of perplexity, per cell")
        p.add_argument("--evaluators", type=int, default=2, help="processes that only evaluate")
        p.add_argument(
            "--groups", type=Path, required=True, help="JSON file of what to train: experiments/gates/"
        )
        p.add_argument("--only", nargs="+", help="names of variants, all others are left out")
        p.add_argument("--group", help="which group this process trains")
        p.add_argument("--seed", type=int, default=1)
        p.add_argument("--threads", type=int, default=2, help="CPU threads per process")
        p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        p.set_defaults(main=function)
    args = parser.parse_args()
    args.main(args)


if __name__ == "__main__":
    main()
