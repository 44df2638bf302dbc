"""What sparse decoding costs in quality: gates, other scorers and KV eviction, on one kernel at one budget.

    python -m experiments.decoding.run perplexity --model runs/smollm2 --gates GATES --text heldout.tar.xz
    python -m experiments.decoding.run needles --gates TEACHER_GATES
    python -m experiments.decoding.run tasks --model runs/smollm2 --gates GATES --text heldout.tar.xz
    python -m experiments.decoding.run problems --model runs/smollm2 --gates GATES --problems test.jsonl
    python -m experiments.decoding.table runs/decoding/*.json

perplexity  of books, every token after the prompt decoded, its text known
needles     eight numbers asked for behind the prompt, in the words that the bundled teacher knows
tasks       after RULER, the question at the prompt's end, through the model's chat template if it has one
problems    of GSM8K behind a prompt full of solved ones: the likelihood of the solution, and the model's own

Prompts are dense; with --prompt POLICY more rows are measured, whose prompts are sparse. Every row is in the
file --out as soon as it is measured: stopped at any point, or by --seconds, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from experiments.teacher.data import read_books
from seerattention import attach, baselines, detach
from seerattention.evals import tasks
from seerattention.evals.tasks import Source
from seerattention.files import json_lines, write_json
from seerattention.hosts.transformers import intercept, load_gates
from seerattention.hosts.transformers.text import encoded
from seerattention.measure import bundled
from seerattention.measure.decoding import Reading, answers, continued
from seerattention.measure.evicting import H2O, SnapKV
from seerattention.measure.needle import NeedleTask
from seerattention.measure.versions import versions
from seerattention.policies import TokenBudget

EVICTING = {"snapkv": SnapKV, "h2o": H2O}
SCORERS = ("oracle_mass", "quest", "meanpool", "streaming", "random")
METHODS = ("gates", *SCORERS, *EVICTING)

#: Tasks and their options: what a small model may be able to do.
TASKS: dict[str, dict[str, Any]] = {
    "niah_single": {},
    "niah_multikey": {"keys": 4},
    "niah_multivalue": {"values": 2},
    "variable_tracking": {},
}

#: Where dense attention is below this share of a task's answers, nothing else is asked.
SKIP_BELOW = 0.05

#: Tokens behind a needle document's prompt: all its questions.
QUESTIONS = 256


def policy_of(method: str, budget: int, block: int = 64) -> TokenBudget:
    """Return what a method reads: always the first block; with eviction half of the budget is the latest."""
    blocks = budget // block
    latest = {**dict.fromkeys(EVICTING, blocks // 2), "streaming": blocks - 1}.get(method, 1)
    return TokenBudget(budget, sink_blocks=1, local_blocks=max(1, latest))


def scorer_of(method: str, args: Any) -> Any:
    """Return what chooses in decoding."""
    if method not in SCORERS:
        return bundled.load_teacher_gates() if args.gates == bundled.BUNDLED else load_gates(args.gates)
    # With first and latest blocks nothing is left to choose, and a GPU is not waited for with this one.
    return baselines.create("meanpool" if method == "streaming" else method)


@contextmanager
def decoding(model: Any, method: str, budget: int | None, args: Any) -> Iterator[Reading]:
    """Let a method choose what decoded tokens read, all if there is no budget; yield what watches it."""
    reading = Reading()
    policy = "dense" if budget is None else policy_of(method, budget)
    if method in EVICTING:
        with intercept(model, EVICTING[method](policy, observe=reading)):
            yield reading
    elif policy == args.prompt == "dense":
        yield reading
    else:
        scorer = None if policy == "dense" else scorer_of(method, args)
        first = scorer if args.prompt == "dense" else bundled.named_gates(args.prompt_gates or args.gates)
        options = {"decode_gates": scorer, "min_tokens": 0, "observe": reading}
        attach(model, first, prefill=args.prompt, decode=policy, **options)
        try:
            yield reading
        finally:
            detach(model)


class Part:
    """One kind of measurement: what a row is called by, and how it comes about."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self.model, self.tokenizer = bundled.named_model(args.model, dtype=args.dtype, device=args.device)

    @cached_property
    def source(self) -> Source:
        """The text, a document per book."""
        if not self.args.text:
            return Source(self.tokenizer, [bundled.text_tokens(self.tokenizer)[1]], self.chat)
        books = [encoded(book, self.tokenizer) for book in read_books(self.args.text)]
        return Source(self.tokenizer, books, self.chat)

    @property
    def chat(self) -> bool:
        """Whether questions are put in a chat template."""
        return bool(self.tokenizer.chat_template)

    def planned(self) -> Iterator[dict[str, Any]]:
        """Yield what every row is called by; dense comes first."""
        prompt = self.args.prompt
        yield {"prompt": prompt, "method": "dense", "budget": None}
        for budget, method in product(self.args.budgets, self.args.methods):
            # What is evicted is decided by a prompt that was read as a whole.
            if prompt == "dense" or method not in EVICTING:
                yield {"prompt": prompt, "method": method, "budget": budget}

    def skip(self, key: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
        """Whether a row is not worth measuring."""
        return False

    def measure(self, key: dict[str, Any]) -> dict[str, Any]:
        """Return a row's values, the first of them what is printed."""
        raise NotImplementedError

    def batches(self, samples: list[Any]) -> Iterator[list[Any]]:
        """Split samples into batches."""
        yield from (samples[i : i + self.args.batch] for i in range(0, len(samples), self.args.batch))


class Perplexity(Part):
    """Books: half of every window is the prompt."""

    @cached_property
    def windows(self) -> list[np.ndarray]:
        """Windows of the books, which take turns."""
        task = tasks.create("perplexity")
        return [task.make(self.source, self.args.length, seed).prompt for seed in range(self.args.samples)]

    def measure(self, key: dict[str, Any]) -> dict[str, Any]:
        """Return perplexity, and every window's mean loss."""
        with decoding(self.model, key["method"], key["budget"], self.args) as reading:
            losses = [
                continued(self.model, np.stack(some), self.args.length // 2, step=self.args.step).losses
                for some in self.batches(self.windows)
            ]
        means = torch.cat(losses).double().mean(1).tolist()
        return {"perplexity": math.exp(fmean(means)), "tokens_read": reading.tokens, "losses": means}


class Needles(Part):
    """Numbers asked for behind the prompt."""

    @cached_property
    def documents(self) -> list[Any]:
        """Needle documents."""
        maker = NeedleTask(self.tokenizer, self.source.haystack)
        return [maker.make(self.args.length, seed) for seed in range(self.args.samples)]

    def measure(self, key: dict[str, Any]) -> dict[str, Any]:
        """Return the share of answers right in every digit, and each document's."""
        prompt, found = self.args.length - QUESTIONS, []
        with decoding(self.model, key["method"], key["budget"], self.args) as reading:
            for some in self.batches(self.documents):
                tokens = np.stack([document.tokens for document in some])
                said = continued(self.model, tokens, prompt, step=self.args.step).predicted.cpu().numpy()
                for document, row in zip(some, said, strict=True):
                    right = document.correct(row[document.query_positions + 1 - prompt])
                    found.append(right / len(document.answers))
        return {"share": fmean(found), "tokens_read": reading.tokens, "shares": found}


class Tasks(Part):
    """Questions after RULER."""

    def planned(self) -> Iterator[dict[str, Any]]:
        """Yield all rows of a task before the next."""
        for task in self.args.tasks:
            yield from ({"task": task, **key} for key in super().planned())

    def skip(self, key: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
        """Whether dense attention cannot do the task."""
        whole = {"task": key["task"], "prompt": "dense", "method": "dense"}
        return any(row["share"] < SKIP_BELOW and whole.items() <= row.items() for row in rows)

    def measure(self, key: dict[str, Any]) -> dict[str, Any]:
        """Return the share of answers found, and each sample's."""
        task, found = tasks.create(key["task"], **TASKS[key["task"]]), []
        samples = [task.make(self.source, self.args.length, seed) for seed in range(self.args.samples)]
        with decoding(self.model, key["method"], key["budget"], self.args) as reading:
            for some in self.batches(samples):
                said = answers(self.model, [sample.prompt for sample in some], self.args.answer)
                for sample, tokens in zip(some, said, strict=True):
                    text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                    found.append(task.score(text, sample.expected))
        return {"share": fmean(found), "tokens_read": reading.tokens, "shares": found}


class Problems(Part):
    """Problems behind solved ones, in the chat template."""

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        lines = [line for _, line in json_lines(args.problems)]
        asked = [(line["question"], re.sub("<<.*?>>", "", line["answer"])) for line in lines]
        self.asked, self.solved = asked[: args.samples], asked[args.samples :]
        self.right = [solution.rsplit("####", 1)[1].strip() for _, solution in self.asked]

    def _turn(self, role: str, content: str, **options: Any) -> np.ndarray:
        text = self.tokenizer.apply_chat_template(
            [{"role": "system", "content": "Solve the problem."}, {"role": role, "content": content}],
            tokenize=False, **options,
        )  # fmt: skip
        head = self.tokenizer.apply_chat_template(
            [{"role": "system", "content": "Solve the problem."}], tokenize=False
        )
        return encoded(text.removeprefix(head), self.tokenizer)

    @cached_property
    def samples(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Prompts of one length, which begin in the middle of a solved problem, and solutions."""
        shots: list[np.ndarray] = []
        for question, solution in self.solved:
            shots = [self._turn("user", question), self._turn("assistant", solution), *shots]
            if sum(map(len, shots)) >= self.args.length:
                break
        before, made = np.concatenate(shots), []
        for question, solution in self.asked:
            prompt = np.concatenate([before, self._turn("user", question, add_generation_prompt=True)])
            made.append((prompt[-self.args.length :], encoded(solution, self.tokenizer)))
        return made

    @cached_property
    def dense_says(self) -> list[np.ndarray]:
        """What dense attention predicts in the solutions."""
        return [said for said, _ in self._solutions()]

    def _solutions(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield every solution's predicted tokens and losses; what fills shorter ones is left out."""
        for some in self.batches(self.samples):
            most = max(len(solution) for _, solution in some)
            rows = [np.pad(np.concatenate(pair), (0, most - len(pair[1]))) for pair in some]
            found = continued(self.model, np.stack(rows), self.args.length, step=self.args.step)
            losses, said = found.losses.double().cpu().numpy(), found.predicted.cpu().numpy()
            yield from ((said[i, : len(s)], losses[i, : len(s)]) for i, (_, s) in enumerate(some))

    def measure(self, key: dict[str, Any]) -> dict[str, Any]:
        """Return likelihood of and agreement on the solutions, and how long and right the model's own are."""
        dense = self.dense_says
        with decoding(self.model, key["method"], key["budget"], self.args) as reading:
            found = list(self._solutions())
        with decoding(self.model, key["method"], key["budget"], self.args):
            prompts = [prompt for prompt, _ in self.samples]
            own = [a for some in self.batches(prompts) for a in answers(self.model, some, self.args.answer)]
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in own]
        last = [(re.findall(r"-?\d[\d,]*\.?\d*", text) or [""])[-1].rstrip(".") for text in texts]
        return {
            "perplexity": math.exp(np.concatenate([losses for _, losses in found]).mean()),
            "tokens_read": reading.tokens,
            "losses": [float(losses.mean()) for _, losses in found],
            "agreement": [float((said == d).mean()) for (said, _), d in zip(found, dense, strict=True)],
            "lengths": [len(tokens) for tokens in own],
            "ended": sum(len(tokens) < self.args.answer for tokens in own),
            "correct": sum(a == b for a, b in zip(last, self.right, strict=True)),
        }


#: What the parts are by default. Answers take a step per token, so fewer methods give them.
PARTS: dict[str, tuple[type[Part], dict[str, Any]]] = {
    "perplexity": (
        Perplexity,
        {"length": 8192, "samples": 13, "budgets": [256, 512, 1024, 2048], "methods": METHODS},
    ),
    "needles": (Needles, {"length": 4096, "samples": 32, "budgets": [256, 512, 1024], "methods": METHODS}),
    "tasks": (
        Tasks,
        {
            "length": 4096, "samples": 40, "budgets": [512, 1024], "answer": 48,
            "methods": ("gates", "quest", "streaming", "snapkv", "h2o"),
        },
    ),
    "problems": (
        Problems,
        {
            "length": 4096, "samples": 40, "budgets": [512], "answer": 512,
            "methods": ("gates", "quest", "snapkv", "h2o"),
        },
    ),
}  # fmt: skip


def main() -> None:
    """Read the command line, measure what is missing, and keep it."""
    args = parsed()
    started, file = time.perf_counter(), args.out or Path("runs/decoding") / f"{args.part}.json"
    own = ("model", "length", "samples", "step", "answer")
    settings = {name: getattr(args, name) for name in own if getattr(args, name) is not None}
    settings["model"] = Path(args.model).name
    part = PARTS[args.part][0](args)
    report = {
        "versions": versions(part.model.device.type),
        "date": datetime.now(UTC).date().isoformat(),
        "part": args.part,
        "settings": settings,
        "rows": [],
    }
    if file.exists():
        before = json.loads(file.read_text())
        if (before["part"], before["settings"]) != (args.part, settings):
            held = f"{before['part']}, {before['settings']}"
            sys.exit(f"error: {file} holds another measurement ({held}); give another --out")
        report["rows"] = before["rows"]
    try:
        # What does not fit is known before any work.
        for method, budget in {(key["method"], key["budget"]) for key in part.planned()}:
            with decoding(part.model, method, budget, args):
                pass
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    names = ("task", "prompt", "method", "budget")
    there = {tuple(row.get(name) for name in names) for row in report["rows"]}
    for key in part.planned():
        if tuple(key.get(name) for name in names) in there or part.skip(key, report["rows"]):
            continue
        if time.perf_counter() - started > args.seconds:
            print(f"time is up; the same command goes on from here, {file} has what is measured")
            return
        began = time.perf_counter()
        row = {**key, **part.measure(key)}
        row["seconds"] = round(time.perf_counter() - began, 2)
        report["rows"].append(row)
        write_json(file, report)
        said = [(n, v) for n, v in row.items() if v is not None and not isinstance(v, list)]
        print("  ".join(f"{n} {v:.4g}" if isinstance(v, float) else str(v) for n, v in said), flush=True)
    print(f"{time.perf_counter() - started:.0f} s; {file}")


def parsed() -> Any:
    """Return the command line's settings, those left out as the part has them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--model", default=bundled.BUNDLED, help="folder or hub id (default: the teacher)")
    parser.add_argument("--gates", default=bundled.BUNDLED, help="folder or hub id of gates for decoding")
    parser.add_argument("--prompt", default="dense", help="policy for prompts (default: %(default)s)")
    parser.add_argument("--prompt-gates", help="gates for prompts that are not dense (default: --gates)")
    parser.add_argument("--text", type=Path, nargs="+", help="books: .txt, folders, .tar.xz")
    parser.add_argument("--problems", type=Path, help="GSM8K's problems, .jsonl")
    parser.add_argument("--out", type=Path, help="file of the results (default: runs/decoding/PART.json)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: those that the part is for")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument("--budgets", type=int, nargs="+", help="key tokens that a decoded token reads")
    parser.add_argument("--length", type=int, help="tokens of a window, or of a prompt")
    parser.add_argument("--samples", type=int, help="windows, documents, questions or problems")
    parser.add_argument("--answer", type=int, help="tokens of a generated answer, at most")
    parser.add_argument("--step", type=int, default=63, help="of known text, a step (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="sequences at once (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after this time")
    parser.add_argument("--dtype", default="auto", help="of the model (default: %(default)s)")
    parser.add_argument("--device", default="", help="default: the GPU if there is one")
    args = parser.parse_args()
    for name, value in PARTS[args.part][1].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.part == "problems" and args.problems is None:
        parser.error("problems needs --problems, GSM8K's test.jsonl")
    return args


if __name__ == "__main__":
    main()
