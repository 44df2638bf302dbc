"""What an evaluation is: methods x densities x lengths x tasks, read from one TOML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seerattention import baselines
from seerattention.evals import tasks
from seerattention.measure.bundled import BUNDLED
from seerattention.policies import parse
from seerattention.settings import build, known, read, typed

#: Policies that methods without one of their own use.
POLICY = "top_k:{density},sink_blocks=1"

#: Instead of a policy: the one saved with the gates.
SAVED = "saved"


@dataclass(frozen=True)
class _File:
    """What a file may have."""

    out: str = ""
    text: tuple[str, ...] = (BUNDLED,)
    lengths: tuple[int, ...] = ()
    densities: tuple[float, ...] = ()
    samples: int = 50
    seed: int = 0
    policy: str = POLICY
    model: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Model:
    """What its table ``model`` may have."""

    name: str = BUNDLED
    dtype: str = "auto"
    device: str = ""
    chat: bool = False
    max_length: int | None = None


@dataclass(frozen=True)
class Method:
    """One way of attending.

    Attributes:
        label: What its rows are called.
        kind: ``dense``, ``gates`` or ``baseline``.
        of: Folder or hub id of the gates; name of the baseline.
        policy: How much is read; ``{density}`` stands for every density in turn.
        options: Of the baseline.
    """

    label: str
    kind: str
    of: str = ""
    policy: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def policies(self, densities: list[float]) -> list[tuple[str, float | None]]:
        """Return (policy, density asked for) of each of its rows, the densest first."""
        if "{density}" not in self.policy:
            return [(self.policy, None)]
        return [(self.policy.replace("{density}", str(d)), d) for d in sorted(densities, reverse=True)]


@dataclass(frozen=True)
class TaskPlan:
    """One task of an evaluation.

    Attributes:
        label: What its rows are called.
        name: One of `tasks.names`.
        options: What the task takes.
        samples: How many, with seeds from the evaluation's on.
        lengths: Tokens.
        skip_below: Where dense attention's share is below this, no other method is asked: what the model
            cannot do dense says nothing about sparse.
    """

    label: str
    name: str
    options: dict[str, Any]
    samples: int
    lengths: list[int]
    skip_below: float = 0.0


@dataclass(frozen=True)
class EvalConfig:
    """An evaluation.

    Attributes:
        out: Folder of the results.
        model: ``bundled``, or a hub id or folder.
        methods: Dense always first.
        plans: The tasks.
        densities: Fractions of the causally valid blocks that methods are asked for.
        text: ``bundled``, or files and folders of ``.txt`` and ``.jsonl``.
        seed: Of the first sample.
        dtype: Of the model's weights.
        device: Where it runs; empty for the GPU if there is one.
        chat: Whether questions are put in the tokenizer's chat template.
        max_length: The model's limit in tokens where its configuration says less, as for scaled RoPE.
    """

    out: Path
    model: str
    methods: list[Method]
    plans: list[TaskPlan]
    densities: list[float]
    text: list[str]
    seed: int = 0
    dtype: str = "auto"
    device: str = ""
    chat: bool = False
    max_length: int | None = None

    @property
    def lengths(self) -> list[int]:
        """All lengths, shortest first."""
        return sorted({length for plan in self.plans for length in plan.lengths})


def read_config(path: Path, overrides: Sequence[str] = ()) -> EvalConfig:
    """Read an evaluation.

    Args:
        path: The TOML file; folders and files in it are relative to the working directory.
        overrides: ``key=value`` over what the file has, see `settings.read`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no TOML, or something in it is unknown, missing or out of range.
    """
    file = build(_File, read(path, overrides), str(path))
    model = build(_Model, file.model, "[model]", "model.")
    for density in file.densities:
        if not 0 < density <= 1:
            raise ValueError(f"densities must be in (0, 1], got {density}")
    if model.max_length is not None:
        _whole("model.max_length", model.max_length)
    lengths, densities = _lengths("lengths", file.lengths), list(file.densities)
    return EvalConfig(
        out=Path(file.out or f"runs/eval/{path.stem}"),
        model=model.name,
        methods=_methods(file.methods, file.policy, densities),
        plans=_plans(file.tasks, _whole("samples", file.samples), lengths),
        densities=densities,
        text=list(file.text),
        seed=_whole("seed", file.seed, least=0),
        dtype=model.dtype,
        device=model.device,
        chat=model.chat,
        max_length=model.max_length,
    )


def _methods(tables: dict[str, Any], policy: str, densities: list[float]) -> list[Method]:
    found = [Method("dense", "dense")]
    for label, content in tables.items():
        table = dict(typed(f"methods.{label}", content, dict))
        if label == "dense":
            known("[methods.dense]", table, ())
            continue
        template = typed(f"methods.{label}.policy", table.pop("policy", policy), str)
        if "gates" in table:
            of = typed(f"methods.{label}.gates", table.pop("gates"), str)
            known(f"[methods.{label}]", table, ("gates", "policy"))
            method = Method(label, "gates", of, template)
        else:
            name = typed(f"methods.{label}.baseline", table.pop("baseline", label), str)
            if name not in baselines.names():
                raise ValueError(
                    f"unknown method {name!r}; there are dense, {', '.join(baselines.names())}, and gates by "
                    f'[methods.{label}] gates = "<folder or hub id>"'
                )
            options = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
            try:
                baselines.create(name, **options)
            except TypeError as error:
                raise ValueError(f"[methods.{label}] has an option that {name} has not: {error}") from error
            method = Method(label, "baseline", name, template, options)
        _check_policies(method, densities)
        found.append(method)
    return found


def _check_policies(method: Method, densities: list[float]) -> None:
    if method.policy == SAVED:
        if method.kind != "gates":
            raise ValueError(f'methods.{method.label}: only gates have a policy "{SAVED}"; write one')
        return
    if "{density}" in method.policy and not densities:
        raise ValueError(
            f"methods.{method.label} asks for {{density}} in its policy; give densities = [0.1, ...]"
        )
    for policy, _ in method.policies(densities):
        parse(policy)


def _plans(tables: dict[str, Any], samples: int, lengths: list[int]) -> list[TaskPlan]:
    if not tables:
        raise ValueError(f"give at least one [tasks.<name>]; there are {', '.join(tasks.names())}")
    plans = []
    for label, content in tables.items():
        options = dict(typed(f"tasks.{label}", content, dict))
        name = typed(f"tasks.{label}.task", options.pop("task", label), str)
        count = _whole(f"tasks.{label}.samples", options.pop("samples", samples))
        own = _lengths(f"tasks.{label}.lengths", options.pop("lengths", lengths))
        skip = typed(f"tasks.{label}.skip_below", options.pop("skip_below", 0.0), float)
        if not 0 <= skip <= 1:
            raise ValueError(f"tasks.{label}.skip_below must be a share from 0 to 1, got {skip!r}")
        if not own:
            raise ValueError("give lengths = [4096, ...], in tokens")
        try:
            tasks.create(name, **options)
        except TypeError as error:
            raise ValueError(f"[tasks.{label}]: {error}") from error
        plans.append(TaskPlan(label, name, options, count, own, skip))
    return plans


def _whole(name: str, value: Any, least: int = 1) -> int:
    if typed(name, value, int) < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
    return value


def _lengths(name: str, value: Any) -> list[int]:
    return sorted({_whole(name, length) for length in typed(name, value, tuple[int, ...])})
