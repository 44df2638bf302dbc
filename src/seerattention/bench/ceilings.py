"""What the device can do at most, measured in the same run as what is compared with it."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch

from seerattention.measure.timing import interleaved

#: Side of the matrix product and bytes copied, per device type: large enough to reach the plateau.
MATMUL = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}
#: Bytes read again and again from the L2 cache: half of what recent GPUs have.
L2_BYTES = 24 * 2**20
#: Reads of them in one measurement.
L2_READS = 64


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float | None]:
    """Measure matrix rate, copy bandwidth and, on a GPU, the rate of reads from the L2 cache.

    The L2 rate is that of sums over ``L2_BYTES`` of int64, many behind one another or as one sum over a
    repeated view, whichever is faster: a lower bound, since neither was written to saturate the cache.

    Args:
        device: ``cpu`` or ``cuda``.
        dtype: Of the matrix product.

    Returns:
        ``matmul_tflops`` of a square product of ``matmul_size``, ``copy_tbs`` (bytes read and written),
        ``l2_tbs`` (None on a CPU).
    """
    kind = torch.device(device).type
    size = MATMUL[kind]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(COPY_BYTES[kind] // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    # A kernel that reads and writes: a graph would replay a plain copy on a copy engine, which is slower.
    runs: dict[str, Callable[[], object]] = {
        "matmul": lambda: a @ b,
        "copy": lambda: torch.bitwise_not(source, out=target),
    }
    l2: dict[str, Callable[[], object]] = {}
    if kind == "cuda":
        x = torch.zeros(L2_BYTES // 8, dtype=torch.int64, device=device)
        l2["l2 sums"] = lambda: [x.sum() for _ in range(L2_READS)]
        l2["l2 repeated"] = x.expand(L2_READS, -1).sum
    seconds = interleaved(runs | l2, repeats=7, warmup=2, device=device)
    best = {name: median(times) for name, times in seconds.items()}
    reads = [L2_READS * L2_BYTES / best[name] for name in l2]
    return {
        "matmul_tflops": round(2 * size**3 / best["matmul"] / 1e12, 4),
        "matmul_size": size,
        "copy_tbs": round(2 * source.nbytes / best["copy"] / 1e12, 4),
        "l2_tbs": round(max(reads) / 1e12, 3) if reads else None,
    }


def l2_tflops(l2_tbs: float, block_q: int, element_size: int) -> float:
    """Return the rate at which K and V read from the L2 cache would feed blocks without sharing.

    A query block does ``4 * block_q * D`` FLOPs per key token and reads ``2 * D`` elements for it.

    Args:
        l2_tbs: Rate of reads, TB/s.
        block_q: Query tokens that share one read.
        element_size: Bytes per element of K and V.

    Returns:
        TFLOP/s.
    """
    return l2_tbs * 2 * block_q / element_size
