"""Times of several variants taken in turn, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


def interleaved(
    variants: Mapping[str, Callable[[], object]], *, repeats: int = 3, warmup: int = 1
) -> dict[str, list[float]]:
    """Time callables in turn, so that a machine's drift hits all alike.

    Args:
        variants: What to time, by name.
        repeats: Timed rounds.
        warmup: Untimed rounds before them.

    Returns:
        Seconds of every timed round by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(warmup + repeats):
        for name, run in variants.items():
            _wait()
            start = time.perf_counter()
            run()
            _wait()
            if round_ >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
