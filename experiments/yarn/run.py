"""Extend a short-context teacher four times by YaRN: densely, with gates distilled afterwards, and jointly.

    python -m experiments.yarn.run --tokens runs/tokens --out runs/yarn --teacher-only
    python -m experiments.yarn.run --tokens runs/tokens --out runs/yarn --seconds 480
    python -m experiments.yarn.run --smoke --out runs/smoke

Every method sees the same text in the same order. What is finished is kept: stopped at any point, or by
--seconds, the same command goes on from there. Results are in OUT/results.json, as a table in OUT/results.md.

With several GPUs, first the command with an empty --only, which prepares what all share, then at once

    CUDA_VISIBLE_DEVICES=0 python -m experiments.yarn.run ... --only dense posthoc
    CUDA_VISIBLE_DEVICES=1 python -m experiments.yarn.run ... --only joint-0.5 joint-0.1
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from experiments.teacher.data import Mixture, tokenise
from experiments.yarn.table import table
from seerattention.files import write_json, write_whole
from seerattention.hosts.transformers import load_gates, new_gates, save_gates
from seerattention.measure import bundled
from seerattention.measure.compare import measured
from seerattention.measure.needle import NeedleTask
from seerattention.measure.versions import versions
from seerattention.train import (
    DistillConfig,
    Distiller,
    FinetuneConfig,
    Finetuner,
    extend_context,
    prepare,
    save_finetuned,
)

HERE = Path(__file__).parent
RECIPE = HERE.parent / "teacher" / "recipe.toml"

#: Policy of training and evaluation: the first and the own block forced, no dense last rows.
POLICY = "top_k:{:g},sink_blocks=1"

#: Densities that one joint step is timed at; others lie on the line between.
TIMED = (0.5, 0.1)


@dataclass(frozen=True)
class Settings:
    """What is trained and measured.

    Attributes:
        factor: Of YaRN.
        length: Tokens per training sequence, at most ``factor`` times the teacher's.
        sequences: Sequences per step.
        gate_steps: Steps in which the gates of all joint runs learn from the teacher, before those runs.
        most_steps: Steps of the language loss, where time allows.
        lr: Of the model.
        gate_lr: Of the gates.
        joint: Densities of the joint runs, one run each.
        posthoc: Densities at which the gates distilled for the dense model are measured.
        needles_share: Of training sequences, those with needles, asked for in their second half.
        repeats_share: Of training sequences, those in which a passage returns; plain books are the rest.
        lengths: Of the evaluation, in tokens.
        text_tokens: Held-out text per length and method.
        documents: Needle documents per length and method.
        needles: Needles in each.
        parts: Parts of a window whose losses are reported.
        block_size: Of the gates.
        save_every: Steps between checkpoints.
    """

    factor: float = 4.0
    length: int = 32768
    sequences: int = 2
    gate_steps: int = 100
    most_steps: int = 400
    lr: float = 1e-3
    gate_lr: float = 3e-3
    joint: tuple[float, ...] = (0.5, 0.4, 0.3, 0.2, 0.1)
    posthoc: tuple[float, ...] = (0.5, 0.1)
    needles_share: float = 0.35
    repeats_share: float = 0.15
    lengths: tuple[int, ...] = (8192, 16384, 32768)
    text_tokens: int = 262144
    documents: int = 32
    needles: int = 8
    parts: int = 8
    block_size: int = 64
    save_every: int = 50


#: Seconds on a CPU, to see that everything runs: its numbers mean nothing.
SMOKE = Settings(
    length=512, sequences=1, gate_steps=2, most_steps=2, joint=(0.5, 0.1), lengths=(256, 512),
    text_tokens=512, documents=1, needles=2, parts=2, block_size=16, save_every=1,
)  # fmt: skip


def changed(settings: Settings, values: dict[str, Any]) -> Settings:
    """Return settings with some of them changed.

    Raises:
        ValueError: If one is not known.
    """
    if unknown := sorted(set(values) - set(asdict(settings))):
        raise ValueError(f"unknown settings {unknown}; known are {sorted(asdict(settings))}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return replace(settings, **values)


class TimeIsUpError(Exception):
    """There is no time left in this call."""


class Experiment:
    """All stages of one run, each skipped where its result is there.

    Args:
        args: The command line.
        settings: What to train and measure.
    """

    def __init__(self, args: argparse.Namespace, settings: Settings) -> None:
        self.args, self.out, self.settings = args, args.out, settings
        self.deadline = args.started + args.seconds
        self.dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
        self.teacher = self._teacher()
        self.tokenizer = AutoTokenizer.from_pretrained(self.teacher)
        books, self.heldout = self._tokens()
        self.mixture = Mixture(books, self.tokenizer, tomllib.loads(RECIPE.read_text())["data"]["digits"])
        task = NeedleTask(self.tokenizer, self.heldout, num_needles=settings.needles)
        self.documents = {
            n: [task.make(n, seed) for seed in range(settings.documents)] for n in settings.lengths
        }
        weights = hashlib.sha256((self.teacher / "model.safetensors").read_bytes()).hexdigest()[:16]
        same = {"settings": json.loads(json.dumps(asdict(settings))), "teacher": weights}
        if self._kept("run") not in (None, same):
            raise ValueError(f"{self.out} holds another run; give another folder or delete it")
        self.joint = {f"joint-{d:g}": d for d in self._extremes_first(settings.joint)}
        if unknown := sorted(set(args.only or ()) - {"dense", "posthoc", *self.joint}):
            raise ValueError(
                f"--only does not know {unknown}; there are dense, posthoc, {', '.join(self.joint)}"
            )
        self._keep("run", same)

    def run(self) -> None:
        """Run what is not done yet."""
        s, dense = self.settings, self.out / "dense" / "model"
        self.measure("teacher, its own RoPE", lambda: (self.load(extended=False), None, ()))
        self.measure("YaRN, not trained", lambda: (self.load(), None, ()))
        self.train_gates("gates-warm", self.load, s.gate_steps)
        steps = self.plan()
        if self._asked("dense"):
            self.train("dense", None, steps)
            self.measure("YaRN, dense training", lambda: (self.load(dense), None, ()))
        if self._asked("posthoc"):
            if not dense.exists():
                raise ValueError("posthoc is about the densely trained model: first run --only dense")
            self.train_gates("gates-posthoc", lambda: self.load(dense), s.gate_steps + steps)
            self.measure(
                "gates distilled afterwards",
                lambda: (self.load(dense), load_gates(self.out / "gates-posthoc"), s.posthoc),
            )
        for name, density in self.joint.items():
            if self._asked(name):
                folder = self.out / name
                self.train(name, density, steps)
                self.measure(
                    "joint",
                    lambda f=folder, d=density: (self.load(f / "model"), load_gates(f / "gates"), (d,)),
                    key=name,
                )

    def _asked(self, name: str) -> bool:
        return self.args.only is None or name in self.args.only

    @staticmethod
    def _extremes_first(densities: tuple[float, ...]) -> list[float]:
        """Return densities with the sparsest and the densest first: they are what is compared."""
        return sorted(densities, key=lambda d: -abs(d - sum(densities) / len(densities)))

    # The teacher and the text.

    def _teacher(self) -> Path:
        """Return the folder of the short-context teacher, trained first where none was given."""
        if self.args.teacher is not None:
            return self.args.teacher
        if self.args.smoke:
            return self._smoke_teacher(self.out / "teacher")
        folder = self.out / "teacher-recipe"
        if not (folder / "teacher" / "results.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            sources = []
            for name in ("books", "heldout"):
                if self.args.tokens is not None and not (folder / f"{name}.npy").exists():
                    os.symlink((self.args.tokens / f"{name}.npy").resolve(), folder / f"{name}.npy")
                sources += [f"--{name}", *map(str, getattr(self.args, name) or [self.args.tokens])]
            left = max(1.0, self.deadline - time.perf_counter())
            command = [sys.executable, "-m", "experiments.teacher.train", *sources, "--out", str(folder)]
            command += ["--recipe", str(HERE / "teacher.toml")]
            command += ["--device", self.args.device, "--max-seconds", str(left)]
            if subprocess.run(command, check=False).returncode:
                sys.exit("error: the teacher's training failed; its last lines say why")
            if not (folder / "teacher" / "results.json").exists():
                raise TimeIsUpError
        return folder / "teacher"

    @staticmethod
    def _smoke_teacher(folder: Path) -> Path:
        """Make an untrained model of 128 tokens with the bundled tokenizer."""
        if not (folder / "config.json").exists():
            tokenizer = AutoTokenizer.from_pretrained(bundled.TEACHER)
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
                tie_word_embeddings=True,
            )  # fmt: skip
            LlamaForCausalLM(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    def _tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Return training and held-out tokens."""
        if self.args.tokens is not None:
            found = tuple(np.load(self.args.tokens / f"{n}.npy", mmap_mode="r") for n in ("books", "heldout"))
        elif self.args.books and self.args.heldout:
            found = tuple(
                tokenise(getattr(self.args, n), self.tokenizer, self.out / f"{n}.npy")
                for n in ("books", "heldout")
            )
        else:
            found = bundled.text_tokens(self.tokenizer)
        return found[0], found[1]

    def batches(self, step: int) -> np.ndarray:
        """Return the sequences of a step, the same for every method."""
        s = self.settings
        shares = {"needles": s.needles_share, "repeats": s.repeats_share}
        return self.mixture.batch(s.length, s.sequences, (1, step), **shares)

    def load(self, folder: Path | None = None, *, extended: bool = True) -> Any:
        """Return a trained model, or the teacher, by default with YaRN; on the device."""
        config = AutoConfig.from_pretrained(folder or self.teacher)
        if folder is None and extended:
            extend_context(config, "yarn", self.settings.factor, self.settings.length)
        model = AutoModelForCausalLM.from_pretrained(folder or self.teacher, config=config, dtype=self.dtype)
        return model.to(self.args.device).eval()

    # Training.

    def plan(self) -> int:
        """Return the steps of the language loss: as many as fit into the time, the same for all methods."""
        if planned := self._kept("plan"):
            return planned["steps"]
        s, times = self.settings, {}
        gates = load_gates(self.out / "gates-warm").float().to(self.args.device)
        for density in (1.0, *TIMED):
            tuner = self._tuner(self.load(), copy.deepcopy(gates), density, 1, None)
            # The first one compiles.
            times[density] = min(tuner.time_a_step() for _ in range(3))
            del tuner
        gate_step = self._kept("training", "gates-warm")["seconds_per_step"]
        slope = (times[TIMED[0]] - times[TIMED[1]]) / (TIMED[0] - TIMED[1])
        joint = sum(times[TIMED[1]] + slope * (d - TIMED[1]) for d in s.joint)
        done = self.results()["rows"]
        evaluation = sum(r["seconds"] for r in done) / 2 * (1 + len(s.posthoc) + len(s.joint))
        # A tenth for loading and saving.
        left = 0.9 * (self.deadline - time.perf_counter()) - 1.3 * evaluation - s.gate_steps * gate_step
        per_step = times[1.0] + joint + gate_step
        steps = s.most_steps if math.isinf(left) else min(s.most_steps, int(left / per_step))
        steps = self.args.steps or steps
        print(
            f"step: dense {times[1.0]:.3f} s, joint {times[TIMED[0]]:.3f} to {times[TIMED[1]]:.3f} s, gates "
            f"alone {gate_step:.3f} s; evaluation about {evaluation:.0f} s; {steps} steps fit",
            flush=True,
        )
        if steps < 1:
            raise TimeIsUpError
        self._keep("plan", {
            "steps": steps,
            "step_seconds": {f"{d:g}": round(t, 4) for d, t in times.items()},
            "tokens_per_method": steps * s.length * s.sequences,
        })  # fmt: skip
        return steps

    def _tuner(self, model: Any, gates: Any, density: float, steps: int, out: Path | None) -> Finetuner:
        config = FinetuneConfig(
            steps=steps,
            lr=self.settings.lr,
            gate_lr=self.settings.gate_lr,
            warmup=0.1,
            density=(density, density),
            gate_weight=10.0 if density < 1 else 0.0,
            save_every=self.settings.save_every,
        )
        return Finetuner(prepare(model), gates, self.batches, config, out=out)

    def train(self, name: str, density: float | None, steps: int) -> None:
        """Train the teacher with YaRN, densely or jointly at a density, and save it."""
        folder = self.out / name
        if (folder / "gates" / "config.json").exists():
            return
        self._look_at_the_clock()
        gates = load_gates(self.out / "gates-warm").float().to(self.args.device)
        tuner = self._tuner(self.load(), gates, density or 1.0, steps, folder)
        self._follow(name, tuner)
        save_finetuned(tuner, folder, policy=POLICY.format(density or 1.0), tokenizer=self.tokenizer)

    def train_gates(self, name: str, load: Callable[[], Any], steps: int) -> None:
        """Distil gates for a model from its dense attention and save them."""
        if (self.out / name / "config.json").exists():
            return
        self._look_at_the_clock()
        model = load()
        torch.manual_seed(1)
        size = self.settings.block_size
        gates = new_gates(model, block_size=size)
        config = DistillConfig(
            steps=steps,
            lr=self.settings.gate_lr,
            save_every=self.settings.save_every,
        )
        tuner = Distiller(model, gates, self.batches, config, out=self.out / f"{name}-run")
        self._follow(name, tuner)
        save_gates(gates, self.out / name, policy=POLICY.format(0.1))

    def _follow(self, name: str, tuner: Any) -> None:
        """Run a training to its end, or to the end of the time."""
        every = max(1, tuner.config.steps // 5)
        seconds: list[float] = []
        for step in tuner.run():
            seconds.append(step.seconds)
            if step.step % every == 0 or step.step == tuner.config.steps:
                values = {k: v for k, v in asdict(step).items() if isinstance(v, float)}
                print(
                    f"{name}: step {step.step}  " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()),
                    flush=True,
                )
            if time.perf_counter() > self.deadline and step.step < tuner.config.steps:
                tuner.save()
                raise TimeIsUpError
        rows = [json.loads(line) for line in (tuner.out / "metrics.jsonl").read_text().splitlines()]
        tail = rows[-max(1, len(rows) // 10) :]
        self._keep("training", {
            "steps": len(rows),
            "tokens": sum(row["tokens"] for row in rows),
            "seconds": round(sum(row["seconds"] for row in rows), 1),
            "seconds_per_step": float(np.median([row["seconds"] for row in rows])),
            "last_loss": sum(row["loss"] for row in tail) / len(tail),
        }, name)  # fmt: skip

    # Measuring.

    def measure(
        self, method: str, load: Callable[[], tuple[Any, Any, tuple[float, ...]]], key: str | None = None
    ) -> None:
        """Measure a model, densely or through its gates at each density; skipped where it is done."""
        key = key or method
        if self._kept("rows", key):
            return
        self._look_at_the_clock()
        model, gates, densities = load()
        rows = [
            {"method": method, "key": key, "asked": density, **self._cell(model, gates, length, density)}
            for density in densities or (None,)
            for length in self.settings.lengths
        ]
        self._keep("rows", rows, key)

    def _cell(self, model: Any, gates: Any, length: int, density: float | None) -> dict[str, Any]:
        s, started = self.settings, time.perf_counter()
        windows = self.heldout[: max(1, s.text_tokens // length) * length].reshape(-1, length)
        found = measured(
            model,
            None if density is None else gates.float(),
            None if density is None else POLICY.format(density),
            windows=list(windows),
            documents=self.documents[length],
        )
        losses, edges = np.stack(found.losses), np.linspace(0, length - 1, s.parts + 1).astype(int)
        row = {
            "tokens": length,
            "density": found.density,
            "perplexity": found.perplexity,
            # Losses at index i are of the token at position i + 1.
            "by_position": [
                {"first": int(a) + 1, "last": int(b), "perplexity": math.exp(losses[:, a:b].mean())}
                for a, b in itertools.pairwise(edges)
            ],
            "text_tokens": windows.size,
            "needle": found.needles,
            "questions": sum(len(d.answers) for d in self.documents[length]),
        }
        row["seconds"] = round(time.perf_counter() - started, 2)
        print(
            f"  {length} tokens, {found.density:.0%}: perplexity {found.perplexity:.3f}, needles "
            f"{found.needles:.3f}",
            flush=True,
        )
        return row

    def _look_at_the_clock(self) -> None:
        if time.perf_counter() > self.deadline:
            raise TimeIsUpError

    # What is finished: a file each, as other processes may be at work on other parts.

    def _file(self, kind: str, name: str) -> Path:
        slug = "-".join("".join(c if c.isalnum() or c in ".-" else " " for c in name).split())
        return self.out / "parts" / f"{kind}{slug and '-'}{slug}.json"

    def _kept(self, kind: str, name: str = "") -> Any:
        """Return a finished part, or None."""
        path = self._file(kind, name)
        return json.loads(path.read_text()) if path.exists() else None

    def _keep(self, kind: str, value: Any, name: str = "") -> None:
        """Write a part, and the results as far as they are."""
        path = self._file(kind, name)
        write_json(path, value)
        report = self.results()
        write_json(self.out / "results.json", report)
        write_whole(self.out / "results.md", lambda file: file.write_text(table(report) + "\n"))

    def results(self) -> dict[str, Any]:
        """Return all that is finished, in the order of the methods."""
        names = [f"joint-{d:g}" for d in sorted(self.settings.joint, reverse=True)]
        keys = [
            "teacher, its own RoPE", "YaRN, not trained", "YaRN, dense training",
            "gates distilled afterwards", *names,
        ]  # fmt: skip
        trained = {n: self._kept("training", n) for n in ("gates-warm", "dense", "gates-posthoc", *names)}
        return {
            "run": self._kept("run"),
            "versions": versions(self.args.device.split(":")[0]),
            **(self._kept("plan") or {}),
            "training": {name: value for name, value in trained.items() if value},
            "rows": [row for key in keys for row in self._kept("rows", key) or ()],
        }


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    parser.add_argument(
        "--teacher",
        type=Path,
        help="short-context teacher; default: one is trained by teacher.toml first",
    )
    parser.add_argument("--tokens", type=Path, help="folder made by experiments.gates.run prepare")
    parser.add_argument("--books", type=Path, nargs="+", help="instead: texts to train on")
    parser.add_argument("--heldout", type=Path, nargs="+", help="and texts to measure on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--seconds",
        type=float,
        default=math.inf,
        help="time of this call; the first one plans its steps by it",
    )
    parser.add_argument("--steps", type=int, default=0, help="steps of the language loss; default what fits")
    parser.add_argument(
        "--set", type=json.loads, default={}, metavar="JSON", help='other settings, e.g. {"lr": 1e-4}'
    )
    parser.add_argument(
        "--only",
        nargs="*",
        metavar="NAME",
        help="of dense, posthoc (after it) and joint-DENSITY; none: what they share; default: all",
    )
    parser.add_argument("--teacher-only", action="store_true", help="stop once there is a teacher")
    parser.add_argument("--smoke", action="store_true", help="seconds on a CPU, on the bundled text")
    args = parser.parse_args()
    args.started = time.perf_counter()
    if not args.smoke and args.tokens is None and not (args.books and args.heldout):
        parser.error("give text: --tokens, or --books and --heldout; or --smoke")
    for path in (args.teacher, args.tokens, *(args.books or ()), *(args.heldout or ())):
        if path is not None and not path.exists():
            parser.error(f"there is no {path}")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    try:
        experiment = Experiment(args, changed(SMOKE if args.smoke else Settings(), args.set))
        if args.teacher_only:
            print(f"the teacher is in {experiment.teacher}")
            return
        experiment.run()
    except TimeIsUpError:
        print(f"time is up; run the same command again to go on, what is finished is in {args.out}")
        return
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    print(table(experiment.results()))
    print(f"{time.perf_counter() - args.started:.0f} s; everything is in {args.out}")


if __name__ == "__main__":
    main()
