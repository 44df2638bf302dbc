"""What experiments on gates share: designs taught by `Distiller` and measured beside what needs no training.

An experiment names gates to teach and ways to choose without any, and says what is measured of each; every
one has a process of its own. Stopped at any point, the same command goes on from there. Results are in
OUT/results.json. Text is tokenised once, into OUT/tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from experiments.teacher.data import read_books
from seerattention import baselines
from seerattention.evals import tasks
from seerattention.evals.tasks import Source
from seerattention.files import read_json, write_json, write_whole
from seerattention.gate_config import GateConfig
from seerattention.hosts.transformers import Gates, new_gates, save_gates
from seerattention.measure import bundled
from seerattention.measure.versions import versions
from seerattention.scorer import Scorer
from seerattention.train import DistillConfig, Distiller, TextWindows
from seerattention.train.loop import METRICS
from seerattention.train.mixture import Mixture

#: Prefill, as experiments measure it: the first and the own block read anyway, no dense last rows.
POLICY = "top_k:{:g},sink_blocks=1"

#: Options that results of one folder share in every experiment.
SHARED = ("characters", "steps", "length", "windows", "block", "questions", "seed")

#: Stands between the name of a variant and a seed other than the first.
SEED = "-seed"


@dataclass(frozen=True)
class Variant:
    """One set of gates to teach.

    Attributes:
        gate: Settings of `new_gates`.
        objective: Name of an objective; default that of `DistillConfig`, as in what follows.
        target: What is learned of a block.
        lr: Peak learning rate.
        retrieval: Share of sequences that ask for what they state.
        repeats: Share in which passages return.
        taught: Whether they learn at all.
        steps: How many, as a multiple of ``--steps``.
        layers: That read what one gate chooses.
    """

    gate: dict[str, Any] = field(default_factory=dict)
    objective: str = ""
    target: str = ""
    lr: float | None = None
    retrieval: float = 0.25
    repeats: float = 0.1
    taught: bool = True
    steps: float = 1.0
    layers: int = 1

    def config(self, steps: int) -> DistillConfig:
        """Return how they are taught, where others are taught for so many steps."""
        given = {"objective": self.objective, "target": self.target, "lr": self.lr}
        named: dict[str, Any] = {name: value for name, value in given.items() if value}
        return DistillConfig(steps=round(self.steps * steps), **named)


#: Gates or a scorer, None for dense attention; and what is found of it, by name.
Measure = Callable[[Gates | Scorer | None], dict[str, Any]]


@dataclass(frozen=True)
class Experiment:
    """Ways to choose blocks, and what is measured of each.

    Beside the options of `parser` a command line has ``length``, tokens per step; ``window``, those of a
    held-out window; and ``questions``, how many of each task.

    Attributes:
        module: What ``python -m`` runs.
        variants: Gates to teach.
        scorers: Ways to choose without gates, baselines or ``dense``.
        settings: Options beside `SHARED` that results of one folder share.
        prepare: Given the command line, the model and its tokenizer, makes what is asked, before any gates
            learn, and returns what measures.
        table: Shows the results.
    """

    module: str
    variants: Mapping[str, Variant]
    scorers: Sequence[str]
    settings: Sequence[str]
    prepare: Callable[[argparse.Namespace, Any, Any], Measure]
    table: Callable[[dict[str, Any]], str]

    def parser(self, description: str | None) -> argparse.ArgumentParser:
        """Return a parser with the options of every experiment."""
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        named = [*self.variants, *self.scorers]
        add = parser.add_argument
        add("--out", type=Path, required=True, help="folder for everything")
        add("--model", default=bundled.BUNDLED, help="hub id or folder (default: %(default)s)")
        add("--text", type=Path, nargs="+", default=[], help="books to train on, the first time")
        add("--heldout", type=Path, nargs="+", default=[], help="and books to measure on")
        add("--characters", type=int, default=50_000, help="of each book to train on")
        add("--steps", type=int, default=300)
        add("--windows", type=int, default=8, help="held-out windows, as long as there are of other books")
        add("--block", type=int, default=64, help="tokens per block")
        add("--only", nargs="+", choices=named, metavar="NAME", help=f"of {', '.join(named)}; default: all")
        add("--seed", type=int, default=1, help="of new gates and of the order of the text")
        add("--seeds", type=int, default=1, help="from --seed on, with each of which gates are taught")
        add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        add("--processes", type=int, default=1, help="at a time, on one device")
        add("--tokens-only", action="store_true", help="stop once there are tokens")
        add("--one", metavar="NAME", help="one of a run's processes")
        return parser

    def main(self, args: argparse.Namespace) -> None:
        """Run what the command line says."""
        args.out.mkdir(parents=True, exist_ok=True)
        try:
            same_settings(args, self)
            for name in ("text", "heldout"):
                tokens_of(args, name)
            if args.tokens_only:
                return
            if args.one:
                one(args, self, args.one)
                return
            started = time.perf_counter()
            teach(args, self)
        except (ValueError, OSError, FloatingPointError) as error:
            sys.exit(f"error: {error}")
        results = collected(args, self)
        write_json(args.out / "results.json", results)
        print(self.table(results))
        print(f"{time.perf_counter() - started:.0f} s; everything is in {args.out}")

    def names(self, args: argparse.Namespace) -> list[str]:
        """Return what is asked for, one name per process."""
        return [
            one for name in args.only or (*self.variants, *self.scorers) for one in self._seeded(args, name)
        ]

    def _seeded(self, args: argparse.Namespace, name: str) -> list[str]:
        if name not in self.variants or not self.variants[name].taught:
            return [name]
        return [name, *(f"{name}{SEED}{args.seed + i}" for i in range(1, args.seeds))]

    def variant(self, args: argparse.Namespace, name: str) -> tuple[Variant, int]:
        """Return the variant of a name, and the seed."""
        base, seed = split_seed(name)
        return self.variants[base], args.seed if seed is None else seed


def split_seed(name: str) -> tuple[str, int | None]:
    """Return the name of a variant or scorer, and a seed other than the first, behind the name."""
    base, _, seed = name.partition(SEED)
    return base, int(seed) if seed else None


def settings(args: argparse.Namespace, experiment: Experiment) -> dict[str, Any]:
    """Return what results of one folder share."""
    named = {name: getattr(args, name) for name in (*SHARED, *experiment.settings)}
    return {"model": Path(args.model).name, **named}


def same_settings(args: argparse.Namespace, experiment: Experiment) -> None:
    """Refuse a folder that holds results of other settings."""
    path, told = args.out / "settings.json", settings(args, experiment)
    if path.exists() and read_json(path) != told:
        raise ValueError(f"{args.out} holds a run of other settings, {path}; give another folder")
    write_json(path, told)


def tokens_of(args: argparse.Namespace, name: str) -> np.ndarray:
    """Return the tokens of the text or of the held-out windows, made on the first call."""
    path: Path = args.out / "tokens" / f"{name}.npy"
    if not path.exists():
        if not (sources := getattr(args, name)):
            raise ValueError(f"{args.out} has no tokens yet; give --text and --heldout")
        _, tokenizer = bundled.named_model(args.model, device="cpu")
        end, parts = tokenizer.convert_tokens_to_ids(tokenizer.eos_token), []
        further: list[np.ndarray] = []
        for book in read_books(sources):
            # A token is a few characters: a window of a book that has one.
            cut = book[: args.characters if name == "text" else 16 * args.window]
            ids = np.array([*tokenizer.backend_tokenizer.encode(cut, add_special_tokens=False).ids, end])
            if name == "text":
                parts.append(ids)
            elif len(ids) > args.window:
                parts.append(ids[: args.window])
                starts = range(args.window, len(ids) - args.window, args.window)
                further += [ids[start : start + args.window] for start in starts]
        if name == "heldout":
            parts = [*parts, *further][: args.windows]
        if not parts:
            raise ValueError(f"no book of --{name} has {args.window} tokens; give longer ones")
        found = np.concatenate(parts).astype(np.uint16 if max(map(max, parts)) < 2**16 else np.uint32)
        path.parent.mkdir(exist_ok=True)
        write_whole(path, lambda place: np.save(place, found))
        print(f"{name}: {len(found):,} tokens of {len(parts)} books")
    return np.load(path)


def windows_of(args: argparse.Namespace) -> list[np.ndarray]:
    """Return the held-out windows, int64 ``[window]`` each."""
    return list(tokens_of(args, "heldout").astype(np.int64).reshape(-1, args.window))


def teach(args: argparse.Namespace, experiment: Experiment) -> None:
    """Start a process for everything that has no result yet, a few at a time, and wait."""
    left = [name for name in experiment.names(args) if not result_of(args, name).exists()]
    running: dict[str, subprocess.Popen[bytes]] = {}
    shown, failed = "", []
    (args.out / "logs").mkdir(exist_ok=True)
    try:
        while left or running:
            while left and len(running) < args.processes:
                name = left.pop(0)
                command = [sys.executable, "-m", experiment.module, *sys.argv[1:], "--one", name]
                with (args.out / "logs" / f"{name}.txt").open("wb") as log:
                    running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            time.sleep(1)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    if process.returncode:
                        failed.append(name)
            said = "; ".join(f"{name} {steps_of(args, name)}" for name in running)
            if said and said != shown and (not shown or not int(time.time()) % 10):
                shown = said
                print(f"{said}; {len(left)} to come", flush=True)
    finally:
        for process in running.values():
            process.terminate()
            process.wait()
    for name in failed:
        lines = (args.out / "logs" / f"{name}.txt").read_text(errors="replace").splitlines()
        print(f"{name} failed:", *lines[-15:], sep="\n")


def steps_of(args: argparse.Namespace, name: str) -> int:
    """Return how many steps gates have been taught."""
    path = args.out / "gates" / name / METRICS
    return len(path.read_text().splitlines()) if path.exists() else 0


def result_of(args: argparse.Namespace, name: str) -> Path:
    """Return the file of one result."""
    return args.out / "results" / f"{name}.json"


def one(args: argparse.Namespace, experiment: Experiment, name: str) -> None:
    """Teach one set of gates, or take a scorer without any, and measure it."""
    if name not in experiment.names(args):
        raise ValueError(f"no process is called {name!r}; there are {', '.join(experiment.names(args))}")
    torch.set_float32_matmul_precision("high")
    dtype = "bfloat16" if args.device.startswith("cuda") else "float32"
    model, tokenizer = bundled.named_model(args.model, dtype=dtype, device=args.device)
    measure = experiment.prepare(args, model, tokenizer)
    started, scorer = time.perf_counter(), None
    row: dict[str, Any] = {"name": name, "variant": split_seed(name)[0]}
    if name not in experiment.scorers:
        gates = taught(args, experiment, name, model, tokenizer)
        # As users load them.
        scorer = gates.to(model.dtype).requires_grad_(False)
        row |= {"gate": gates.config.to_dict()}
        row |= {"taught": last_step(args, name)} if experiment.variant(args, name)[0].taught else {}
    elif name != "dense":
        scorer = baselines.create(name, block_size=[args.block, args.block])
    row |= measure(scorer)
    row["seconds"] = round(time.perf_counter() - started, 1)
    result_of(args, name).parent.mkdir(exist_ok=True)
    write_json(result_of(args, name), row)


def taught(args: argparse.Namespace, experiment: Experiment, name: str, model: Any, tokenizer: Any) -> Gates:
    """Teach gates to the end, from their last checkpoint on."""
    variant, seed = experiment.variant(args, name)
    out = args.out / "gates" / name
    torch.manual_seed(seed)
    design = {"gate_dim": head_dim(model)} if name.startswith("published") else {}
    # Fewer tokens per block than the designs are made for: as many summaries per block.
    settings = {**variant.gate, **design, "block_size": args.block}
    gates = new_gates(model, layers_per_gate=variant.layers, **settings)
    if not variant.taught:
        return gates
    text = TextWindows(tokens_of(args, "text"), args.length, 1, seed)
    text = Mixture(text, tokenizer, variant.retrieval, variant.repeats, seed)
    # Gaps in positions only where more is measured.
    reach = max(args.length, args.window)
    for step in Distiller(model, gates, text, variant.config(args.steps), out=out, reach=reach).run():
        recalls = [x for x in (step.recall, step.decode_recall) if x is not None]
        print(
            step.step, f"{step.loss:.4f}", *(f"{x:.4f}" for x in recalls), f"{step.seconds:.2f}", flush=True
        )
    save_gates(gates, out / "gates")
    return gates


def head_dim(model: Any) -> int:
    """Return the dimension of a model's heads."""
    c = model.config
    return getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads


def last_step(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return what the last step of teaching said, with the median time of all."""
    rows = [json.loads(line) for line in (args.out / "gates" / name / METRICS).read_text().splitlines()]
    keys = ("step", "loss", "recall", "decode_recall")
    times = sorted(row["seconds"] for row in rows)
    return {**{key: rows[-1][key] for key in keys}, "seconds_per_step": round(times[len(times) // 2], 3)}


class Question(NamedTuple):
    """A prompt and its answer.

    Attributes:
        prompt: int64 ``[n]``.
        answer: int64 ``[m]``; several numbers in the text's order, joined by a word.
        counts: bool ``[m]``, the tokens that must be looked up: digits, but for the first where there are
            several numbers, of which a model may begin with any.
    """

    prompt: np.ndarray
    answer: np.ndarray
    counts: np.ndarray


def questions(
    args: argparse.Namespace, tokenizer: Any, asked: Mapping[str, dict[str, Any]], length: int
) -> dict[str, list[Question]]:
    """Return ``args.questions`` questions of each task, by name, behind the text of the held-out windows.

    Args:
        args: The command line.
        tokenizer: The model's.
        asked: Options of every task.
        length: Tokens of a prompt with the answer that may be generated, at most.
    """
    text = tokens_of(args, "heldout").astype(np.int64)
    source = Source(tokenizer, [text], bool(tokenizer.chat_template))
    found: dict[str, list[Question]] = {}
    for name, options in asked.items():
        task = tasks.create(name, **options)
        made = [task.make(source, length, seed) for seed in range(args.questions)]
        found[name] = [question(source, one) for one in made]
    return found


def question(source: Source, sample: tasks.Sample) -> Question:
    """Return a sample whose answer is numbers, with what a model says that answers it."""
    numbers = [sample.expected[i] for i in np.argsort(sample.places)]
    answer = source.encode(" " + " and ".join(numbers))
    pieces = [str(source.tokenizer.decode([token])) for token in answer.tolist()]
    counts = np.array([any(map(str.isdigit, piece)) for piece in pieces])
    if len(numbers) > 1:
        counts[counts.argmax()] = False
    return Question(sample.prompt, answer, counts)


def collected(args: argparse.Namespace, experiment: Experiment) -> dict[str, Any]:
    """Return all results there are."""
    order = {name: i for i, name in enumerate((*experiment.scorers, *experiment.variants))}
    there = [(*split_seed(path.stem), path) for path in (args.out / "results").glob("*.json")]
    found = sorted((order[name], seed or 0, path) for name, seed, path in there if name in order)
    return {
        "versions": versions(),
        "settings": settings(args, experiment),
        "variants": {name: asdict(variant) for name, variant in experiment.variants.items()},
        "rows": [read_json(path) for *_, path in found],
    }


def cost(config: GateConfig, tokens: int = 32768) -> float:
    """Return a gate's multiplications and additions as a share of dense causal attention's."""
    c, heads = config, config.num_kv_heads / config.num_heads
    # Of a group's queries, merged by their projection, there is one score.
    scores = tokens**2 * c.dim / (c.q_sub * c.k_sub) * (heads if c.per_kv_head else 1)
    # Without a projection of queries keys have one per query head.
    queries, keys = (len(c.q_pool), heads * len(c.k_pool)) if c.q_proj else (0, len(c.k_pool))
    project = 2 * tokens * c.head_dim * c.dim * (queries / c.q_sub + keys / c.k_sub)
    return (scores + project) / (2 * tokens**2 * c.head_dim)
