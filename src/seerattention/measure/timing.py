"""Times of several variants taken in turn, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

T = TypeVar("T")

#: A sample on a GPU is as many launches behind one another as fit into this time, in seconds, at most
#: ``MOST_LAUNCHES``: long enough for the clock to settle at the power that the kernel draws.
SAMPLE_SECONDS, MOST_LAUNCHES = 0.05, 50


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 3,
    warmup: int = 1,
    device: str | torch.device = "cpu",
    after: Callable[[str], None] | None = None,
) -> dict[str, list[float]]:
    """Time callables in turn, so that a machine's drift hits all alike.

    Args:
        variants: What to time, by name.
        repeats: Timed rounds.
        warmup: Untimed rounds before them.
        device: Where they run. On ``cuda`` a sample is the mean of many launches behind one another,
            replayed as one CUDA graph where they can be captured, so that the host's time per launch
            does not count; elsewhere the wall time of one call.
        after: Called with the variant's name after every sample, untimed ones too, e.g. for a progress bar.

    Returns:
        Seconds of every timed round by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    cuda = torch.device(device).type == "cuda"
    launches = dict.fromkeys(variants, 1)
    for round_ in range(warmup + repeats):
        for name, run in variants.items():
            if cuda and round_ == 0:
                # The first call may compile; the second says how many fit into a sample.
                run()
                fit = int(SAMPLE_SECONDS / _events(run, 1))
                launches[name] = max(1, min(MOST_LAUNCHES, fit))
            sample = _launched(run, launches[name]) if cuda else timed(run)[1]
            if round_ >= warmup:
                seconds[name].append(sample)
            if after is not None:
                after(name)
    return seconds


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """Return what a call returns and its wall time in seconds, the GPU waited for before and after."""
    _wait()
    start = time.perf_counter()
    result = run()
    _wait()
    return result, time.perf_counter() - start


def captured(run: Callable[[], object], launches: int = 1) -> Callable[[], None] | None:
    """Return what replays so many calls as one CUDA graph, or None if they wait for the device."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(launches):
                run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def _launched(run: Callable[[], object], launches: int) -> float:
    """Return the mean seconds of a launch, the host's share left out where that is possible."""
    replay = captured(run, launches)
    # What waits for the device cannot be captured, and its waiting belongs to its time.
    return _events(run, launches) if replay is None else _events(replay, 1) / launches


def _events(run: Callable[[], object], launches: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(launches):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / launches / 1e3


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_mb(run: Callable[[], object], *, result: bool = True) -> float:
    """Return the peak memory of a call on a GPU beyond what is there before it, in MB of 10^6 bytes.

    Args:
        run: Called twice: what the first call makes and keeps, such as a compiled kernel, is not counted.
        result: Count what the call returns, too.
    """
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = run()
    torch.cuda.synchronize()
    kept = before if result else torch.cuda.memory_allocated()
    del made
    return (torch.cuda.max_memory_allocated() - max(before, kept)) / 1e6
