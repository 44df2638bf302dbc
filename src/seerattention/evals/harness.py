"""Runs an evaluation: every method on the same samples, one record each, none of them twice."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from statistics import fmean
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from seerattention import baselines
from seerattention.evals import tasks
from seerattention.evals.config import SAVED, EvalConfig, Method, TaskPlan
from seerattention.evals.records import Record, RecordFile
from seerattention.evals.tasks import Sample, Source, Task, generate, share_found
from seerattention.gate import Scorer
from seerattention.hosts.transformers import Gates, base_checksum
from seerattention.measure import bundled
from seerattention.measure.bundled import BUNDLED
from seerattention.measure.compare import attached, short_of
from seerattention.measure.observe import Watch
from seerattention.measure.versions import versions
from seerattention.train.data import text_documents, text_files

#: A prompt that falls short of its length by more than this share was cut.
SHORTEST = 0.9

#: Tokens generated to time one, when an estimate is asked for.
TIMED_TOKENS = 4


@dataclass(frozen=True)
class Cell:
    """One row of the summary: samples of one task and length by one method and policy.

    Attributes:
        plan: The task.
        length: Tokens.
        method: Who attends.
        policy: How much is read; empty if dense.
        asked: Density asked for, where the policy has one.
        of: Fingerprint of everything the results follow from but the seeds.
        seeds: Of the samples.
    """

    plan: TaskPlan
    length: int
    method: Method
    policy: str
    asked: float | None
    of: str
    seeds: range

    @property
    def name(self) -> str:
        """The cell in words."""
        density = "" if self.asked is None else f" {self.asked:.3g}"
        return f"{self.plan.label} {self.length:,} {self.method.label}{density}"


def load_model(config: EvalConfig) -> tuple[PreTrainedModel, Source]:
    """Load the model an evaluation is about, its tokenizer and the text.

    Raises:
        FileNotFoundError: If a text does not exist.
        ValueError: If dtype or device are not known, or the text is empty.
    """
    paths = [] if config.text == [BUNDLED] else text_files(config.text)
    model, tokenizer = bundled.named_model(config.model, dtype=config.dtype, device=config.device)
    if not paths:
        documents = [bundled.text_tokens(tokenizer)[1]]
    else:
        end = tokenizer.eos_token_id
        read = text_documents(paths, tokenizer)()
        documents = [d[:-1] if len(d) and d[-1] == end else d for d in read]
    return model, Source(tokenizer, documents, config.chat)


class Evaluation:
    """An evaluation on a loaded model.

    Args:
        config: What to do.
        model: The model.
        source: Its tokenizer and the text.

    Raises:
        ValueError: If a length is past the model's limit, a sample cannot be made, or gates do not fit.
    """

    def __init__(self, config: EvalConfig, model: PreTrainedModel, source: Source) -> None:
        self.config, self.model, self.source = config, model, source
        limit = config.max_length or getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and (past := [n for n in config.lengths if n > limit]):
            raise ValueError(
                f"length past the model's limit: {', '.join(map(str, past))} tokens, the model takes "
                f"{limit}; leave them out, or set model.max_length if its RoPE is scaled"
            )
        self.tasks: dict[str, Task] = {p.label: tasks.create(p.name, **p.options) for p in config.plans}
        self.scorers = {m.label: _scorer(m) for m in config.methods}
        # Everything is attached once, so that what does not fit is known before any work.
        for method in config.methods:
            for policy, _ in method.policies(config.densities):
                with self._attached(method, policy):
                    pass
        self._known = {
            label: _weights(scorer) if isinstance(scorer, Gates) else ""
            for label, scorer in self.scorers.items()
        }
        self.cells = list(self._cells())
        most = max(len(cell.seeds) for cell in self.cells)
        # The samples of one task and length, which all methods get in turn.
        self.sample = lru_cache(maxsize=most)(self._sample)
        # Every sample is made once, so that what cannot be made is known before any work.
        for plan in config.plans:
            for length in plan.lengths:
                for seed in range(config.seed, config.seed + plan.samples):
                    self.tasks[plan.label].make(source, length, seed)

    def _cells(self) -> Iterator[Cell]:
        for length in self.config.lengths:
            for plan in self.config.plans:
                if length not in plan.lengths:
                    continue
                for method in self.config.methods:
                    for policy, asked in method.policies(self.config.densities):
                        seeds = range(self.config.seed, self.config.seed + plan.samples)
                        of = self._fingerprint(plan, length, method, policy)
                        yield Cell(plan, length, method, policy, asked, of, seeds)

    @cached_property
    def _base(self) -> dict[str, Any]:
        text = hashlib.sha256(self.source.haystack.tobytes())
        text.update(np.array([len(d) for d in self.source.documents]).tobytes())
        return {
            "model": self.config.model,
            "weights": base_checksum(self.model),
            "dtype": str(self.model.dtype),
            "device": versions(self.model.device.type)["device"],
            "chat": self.config.chat,
            "text": text.hexdigest(),
        }

    def _fingerprint(self, plan: TaskPlan, length: int, method: Method, policy: str) -> str:
        content = {
            **self._base,
            "task": [plan.name, plan.options, length],
            "method": [method.kind, self._known[method.label] or method.of, method.options, policy],
        }
        text = json.dumps(content, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _attached(self, method: Method, policy: str) -> AbstractContextManager[Watch]:
        scorer = self.scorers[method.label]
        return attached(self.model, scorer, None if policy == SAVED else policy)

    def _sample(self, label: str, length: int, seed: int) -> tuple[Sample, list[str]]:
        task = self.tasks[label]
        sample = task.make(self.source, length, seed)
        return sample, prompt_faults(self.source, task, sample, length)

    def missing(self, file: RecordFile) -> int:
        """Return how many samples have no record yet, without those that are not worth making."""
        return sum(1 for _ in self._missing(file))

    def _missing(self, file: RecordFile) -> Iterator[Cell]:
        """Yield the cell of every sample that is missing."""
        for cell in self.cells:
            if not self.skipped(cell, file):
                yield from (cell for seed in cell.seeds if (cell.of, seed) not in file.records)

    def skipped(self, cell: Cell, file: RecordFile) -> bool:
        """Whether dense attention is known to fail at a task, so that nothing else is asked it."""
        share = self.tasks[cell.plan.label].metric == "share"
        if cell.method.kind == "dense" or not cell.plan.skip_below or not share:
            return False
        dense = next(
            c
            for c in self.cells
            if c.method.kind == "dense" and (c.plan, c.length) == (cell.plan, cell.length)
        )
        found = [file.records.get((dense.of, seed)) for seed in dense.seeds]
        scores = [record.score for record in found if record is not None and record.score is not None]
        return len(scores) == len(dense.seeds) and fmean(scores) < cell.plan.skip_below

    def short(self) -> list[str]:
        """Return where texts are too short for the density asked for; see `Policy.short_of`."""
        found = (
            short_of(scorer, None if cell.policy == SAVED else cell.policy, cell.length)
            for cell in self.cells
            if (scorer := self.scorers[cell.method.label]) is not None
        )
        return list(dict.fromkeys(filter(None, found)))

    def run(self, file: RecordFile, done: Callable[[Cell, Record | None], None]) -> None:
        """Make every record that is missing.

        Args:
            file: Where they go.
            done: Called with every record made, and with None when a cell is complete or skipped.
        """
        for cell in self.cells:
            if self.skipped(cell, file):
                done(cell, None)
                continue
            seeds = [seed for seed in cell.seeds if (cell.of, seed) not in file.records]
            if seeds:
                with self._attached(cell.method, cell.policy) as watch:
                    for seed in seeds:
                        record = self._record(cell, seed, watch)
                        file.append(record)
                        done(cell, record)
            done(cell, None)

    def _record(self, cell: Cell, seed: int, watch: Watch) -> Record:
        task = self.tasks[cell.plan.label]
        sample, faults = self.sample(cell.plan.label, cell.length, seed)
        watch.reset()
        outcome = task.run(self.model, self.source, sample)
        faults = list(faults)
        if sample.new_tokens and not outcome.answer.strip():
            faults.append("empty answer")
        if not math.isfinite(outcome.score):
            faults.append("not finite")
        if cell.method.kind != "dense" and not watch.valid:
            faults.append("ran dense")
        return Record(
            of=cell.of,
            method=cell.method.label,
            policy=cell.policy,
            task=cell.plan.label,
            metric=task.metric,
            length=cell.length,
            tokens=len(sample.prompt),
            density_asked=cell.asked,
            density=watch.density,
            seed=seed,
            expected=list(sample.expected),
            depths=sample.depths,
            answer=outcome.answer,
            score=outcome.score if math.isfinite(outcome.score) else None,
            prefill_s=outcome.prefill_s,
            seconds=outcome.seconds,
            faults=faults,
            by_position=[part for part in outcome.by_position if math.isfinite(part[2])],
        )

    def estimate(self, file: RecordFile) -> float:
        """Return about how many seconds the missing records take, if all methods took as long as dense.

        Dense prefill is timed at the shortest length and at half of it, and taken to grow with a linear and
        a quadratic part; so is one token of an answer, taken to cost as much at every length.
        """
        length = min(self.config.lengths)
        prompt = np.resize(self.source.haystack, length)
        generate(self.model, prompt[: length // 2], 2)
        _, half_s, _ = generate(self.model, prompt[: length // 2], 1)
        _, full_s, total_s = generate(self.model, prompt, TIMED_TOKENS)
        token_s = (total_s - full_s) / (TIMED_TOKENS - 1)
        # a n + b n^2 through both times, with neither part negative.
        b = min(max(0.0, (full_s - 2 * half_s) * 2 / length**2), full_s / length**2)
        a = full_s / length - b * length
        return sum(
            a * cell.length + b * cell.length**2 + token_s * self.tasks[cell.plan.label].new_tokens
            for cell in self._missing(file)
        )


def prompt_faults(source: Source, task: Task, sample: Sample, length: int) -> list[str]:
    """Return what is wrong with a prompt, by name: what a harness can break without anything failing.

    ``double BOS``: the token that begins a text stands in it more often than the chat template has it, or
    twice at its beginning, as when template and tokenizer both write it. ``no BOS``: the tokenizer adds it,
    and it is not there. ``truncated prompt``: an expected answer is not in the prompt any more, or it is much
    shorter than asked for. ``prompt too long``: with the answer it is longer than asked for.
    """
    tokenizer, prompt, faults = source.tokenizer, sample.prompt, []
    bos = tokenizer.bos_token_id
    if bos is not None:
        # Where one token both begins and ends texts, only two at the beginning are a mistake.
        once = bos == tokenizer.eos_token_id or np.count_nonzero(prompt == bos) <= max(
            1, sum(np.count_nonzero(part == bos) for part in source.frame)
        )
        if not once or bool((prompt[:2] == bos).all()):
            faults.append("double BOS")
        if len(source.bos) and prompt[0] != bos:
            faults.append("no BOS")
    score = getattr(task, "score", share_found)
    whole = len(prompt) + sample.new_tokens
    lost = bool(sample.expected) and score(str(tokenizer.decode(prompt.tolist())), sample.expected) < 1
    if lost or whole < SHORTEST * length:
        faults.append("truncated prompt")
    if whole > length:
        faults.append("prompt too long")
    return faults


def _scorer(method: Method) -> Gates | Scorer | None:
    if method.kind == "dense":
        return None
    if method.kind == "baseline":
        return baselines.create(method.of, **method.options)
    return bundled.named_gates(method.of)


def _weights(gates: Gates) -> str:
    """Return a fingerprint of gates: their values and their saved policies."""
    digest = hashlib.sha256(f"{gates.config} {gates.policy} {gates.decode_policy}".encode())
    for name, values in sorted(gates.state_dict().items()):
        digest.update(name.encode() + values.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
