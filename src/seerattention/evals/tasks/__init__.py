"""What a model is asked: one file per task, found by its name; it defines ``create(**options) -> Task``.

A task makes samples, each a pure function of its options, the tokenizer, the text, a length and a seed,
whatever else ran; and runs a model on one. The families after RULER (arXiv 2404.06654) use its wording,
sizes, lengths of answers and scoring; what differs is said in each file.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

from seerattention.evals.tasks._base import Outcome as Outcome
from seerattention.evals.tasks._base import Sample as Sample
from seerattention.evals.tasks._base import Source as Source
from seerattention.evals.tasks._base import Task as Task
from seerattention.evals.tasks._base import generate as generate
from seerattention.evals.tasks._base import share_found as share_found
from seerattention.evals.tasks._base import whether_any as whether_any


def names() -> list[str]:
    """Return the names of all tasks."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def create(name: str, **options: Any) -> Task:
    """Make a task.

    Args:
        name: One of `names`.
        options: What the task's file takes.

    Raises:
        ValueError: If there is no such task, or it has no such option.
    """
    if name not in names():
        raise ValueError(f"unknown task {name!r}; there are {', '.join(names())}")
    make = importlib.import_module(f"seerattention.evals.tasks.{name}").create
    known = list(inspect.signature(make).parameters)
    if unknown := sorted(set(options) - set(known)):
        what = f"its options are {', '.join(known)}" if known else "it has none"
        raise ValueError(f"task {name!r} has no option {', '.join(map(repr, unknown))}; {what}")
    return make(**options)
