"""Distil the gates that ship with the teacher, and measure them; killed, the same command continues.

python -m experiments.teacher.gates --teacher runs/teacher/teacher --books books/ --heldout heldout/
"""

from __future__ import annotations

import argparse
import json
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.teacher.data import Mixture, tokenise
from seerattention import baselines
from seerattention.hosts.transformers import new_gates, save_gates
from seerattention.measure.compare import measured
from seerattention.measure.needle import NeedleTask
from seerattention.train import DistillConfig, Distiller

HERE = Path(__file__).parent
#: Compared with the gates.
SCORERS = ("oracle", "xattention", "quest", "meanpool", "streaming", "random")


class Batches:
    """The batch of a step: lengths in turn, made from books, needles and repeated passages."""

    def __init__(self, mixture: Mixture, settings: dict[str, Any], seed: int) -> None:
        self.mixture = mixture
        self.lengths = settings["lengths"]
        self.length = max(self.lengths)
        self.tokens = settings["tokens"]
        self.shares = {"needles": settings["needles"], "repeats": settings["repeats"]}
        self.seed = seed

    def __call__(self, step: int) -> np.ndarray:
        """Return int64 ``[tokens / length, length]``."""
        length = self.lengths[step % len(self.lengths)]
        return self.mixture.batch(length, max(1, self.tokens // length), (self.seed, step), **self.shares)


def evaluate(
    model: Any, gates: Any, tokenizer: Any, heldout: np.ndarray, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Measure dense attention, the gates and the oracle at every length; dense first."""
    task = NeedleTask(tokenizer, heldout)
    rows = []
    methods = {"dense": None, "gates": gates} | {name: baselines.create(name) for name in SCORERS}
    for length in sorted(set(settings["lengths"])):
        documents = [task.make(length, seed) for seed in range(settings["documents"])]
        windows = heldout[: max(1, settings["text_tokens"] // length) * length].reshape(-1, length)
        for name, scorer in methods.items():
            found = measured(
                model, scorer, settings["policy"], method=name, windows=list(windows), documents=documents
            ).values()
            rows.append(
                {
                    "method": name,
                    "tokens": length,
                    "density": round(found["density"], 4),
                    "perplexity": round(found["perplexity"], 3),
                    "needle": round(found["needles"], 4),
                    "questions": sum(len(document.answers) for document in documents),
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Train what is left to train, save, measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, required=True, help="folder with the trained teacher")
    parser.add_argument(
        "--books", type=Path, nargs="+", required=True, help="training texts: .txt, folders or .tar.xz"
    )
    parser.add_argument("--heldout", type=Path, nargs="+", required=True, help="texts for evaluation only")
    parser.add_argument("--out", type=Path, default=Path("runs/gates"), help="default: %(default)s")
    parser.add_argument("--recipe", type=Path, default=HERE / "recipe.toml", help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--gate", type=json.loads, default={}, help='gate settings as JSON, e.g. {"k_sub_block": 16}'
    )
    args = parser.parse_args()
    recipe = tomllib.loads(args.recipe.read_text())
    settings = recipe["gates"]
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    # The weights are bfloat16; a CPU computes them faster in float32.
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=dtype).to(args.device).eval()
    model.config._name_or_path = "seerattention/teacher"
    books = tokenise(args.books, tokenizer, args.out / "books.npy")
    heldout = tokenise(args.heldout, tokenizer, args.out / "heldout.npy")
    mixture = Mixture(books, tokenizer, recipe["data"]["digits"])
    torch.manual_seed(recipe["seed"])
    gates = new_gates(model, **args.gate)
    batches = Batches(mixture, settings, recipe["seed"])
    config = DistillConfig(steps=settings["steps"])
    started = time.perf_counter()
    trainer = Distiller(model, gates, batches, config, out=args.out)
    for step in trainer.run():
        if step.step % 20 == 0 or step.step == config.steps:
            print(
                f"step {step.step}/{config.steps}  loss {step.loss:.4f}  recall {step.recall:.3f}  "
                f"{step.seconds:.2f} s/step  {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    save_gates(gates.bfloat16(), args.out / "gates", policy=settings["policy"])
    # What is shipped is what is measured: weights rounded to bfloat16.
    rows = evaluate(model, gates.float(), tokenizer, heldout, settings)
    (args.out / "gates" / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(f"the gates are in {args.out / 'gates'}")


if __name__ == "__main__":
    main()
