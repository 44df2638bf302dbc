"""Whether the host waits for a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def _sync_debug_mode(mode: str) -> None:
    with warnings.catch_warnings():
        # torch says at every switch that the mode is a prototype which does not notice all waiting.
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise where the host waits for the GPU while the context lasts, as far as torch notices.

    Raises:
        RuntimeError: From the call that waits.
    """
    torch.cuda.synchronize()
    _sync_debug_mode("error")
    try:
        yield
    finally:
        _sync_debug_mode("default")
