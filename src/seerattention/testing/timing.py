"""Times of several variants taken in turn, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

#: Bytes written between timed launches on a GPU: more than any L2 cache holds, so that no variant finds
#: its inputs there because it ran just before.
FLUSH_BYTES = 2**30

#: A sample on a GPU is the mean of as many launches as fit into this time, in seconds, at most
#: ``MOST_LAUNCHES``: one launch of a short kernel is at the mercy of the clock and the host.
SAMPLE_SECONDS, MOST_LAUNCHES = 0.02, 10


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
        device: Where they run. On ``cuda`` a sample is the mean of several launches, each timed by CUDA
            events after the L2 cache was flushed; elsewhere the wall time of one call.
        after: Called with the variant's name after every sample, untimed ones too, e.g. for a progress bar.

    Returns:
        Seconds of every timed round by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    cuda = torch.device(device).type == "cuda"
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if cuda else None
    launches = dict.fromkeys(variants, 1)
    for round_ in range(warmup + repeats):
        for name, run in variants.items():
            if flush is not None and round_ == 0:
                # The first call may compile; the second says how many fit into a sample.
                run()
                fit = int(SAMPLE_SECONDS / _events(run, flush, 1))
                launches[name] = max(1, min(MOST_LAUNCHES, fit))
            sample = _wall(run) if flush is None else _events(run, flush, launches[name])
            if round_ >= warmup:
                seconds[name].append(sample)
            if after is not None:
                after(name)
    return seconds


def _wall(run: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - start


def _events(run: Callable[[], object], flush: Tensor, launches: int) -> float:
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(launches)]
    for start, end in pairs:
        # The flush keeps the GPU busy while the host prepares the launch, so its overhead stays hidden.
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in pairs) / launches / 1e3


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
