"""How Triton kernels are compiled and started."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from seerattention.ops.language import padded, power_of_two
from seerattention.ops.options import Options

Given = TypeVar("Given", bound=Options)


@dataclass(frozen=True)
class Launch:
    """How a kernel is compiled and started.

    Attributes:
        block_m: Queries per tile, or query blocks where these are scored; a longer one is several tiles.
        block_n: Keys per tile, or KV blocks where these are scored; a longer one is several tiles.
        warps: Warps per program.
        stages: Steps of the loop over keys or a list that are in flight.
        programs: Programs per multiprocessor.
        registers: Most registers per thread, to let more programs share a multiprocessor; NVIDIA only.
        tma: Whether TMA brings tiles, where there is TMA and the kernel can use it.
        direct: Whether threads store what they hold themselves, in PTX, where a kernel can; NVIDIA only.
        resident: Summaries per query block held in shared memory at a time, where blocks are scored.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    programs: int = 1
    registers: int | None = None
    tma: bool = True
    direct: bool = False
    resident: int = 1

    def within(self, queries: int, keys: int) -> Launch:
        """Return the launch with tiles no larger than a block; a product needs 16 queries at least."""
        block_m = min(self.block_m, max(16, power_of_two(queries)))
        return replace(self, block_m=block_m, block_n=min(self.block_n, keys))

    def constants(
        self, q: Tensor, k: Tensor, block_size: tuple[int, int], options: Options
    ) -> dict[str, Any]:
        """Return what a kernel of attention and its compiler know ahead of a call."""
        return {
            "HEADS": q.shape[1],
            "KV_HEADS": k.shape[1],
            "D": q.shape[3],
            "BLOCK_D": padded(q.shape[3]),
            "BLOCK_Q": block_size[0],
            "BLOCK_K": block_size[1],
            "SOFTCAP": options.softcap is not None,
            "SEQUENCES": power_of_two(options.sequences) if options.sequences else 0,
            "STAGES": self.stages,
            **self.tile(),
        }

    def tile(self) -> dict[str, int]:
        """Return a tile's sizes and what the compiler is told."""
        given = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}
        given |= {"num_warps": self.warps, "num_stages": self.stages}
        if self.registers and torch.version.hip is None:
            given["maxnreg"] = self.registers
        return given

    def most_programs(self, device: torch.device) -> int:
        """Return how many programs the device runs at a time; in the interpreter, two."""
        if device.type == "cpu":
            return 2
        return self.programs * torch.cuda.get_device_properties(device).multi_processor_count


def overlapping(device: torch.device) -> dict[str, bool]:
    """Return what starts a kernel while the launch before it ends, from NVIDIA's Hopper on.

    Its programs are in place when they may go on, which `language.wait` waits for. They come when the launch
    before has called `language.release` in every program: too early, they take the places of others and lie
    unevenly.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return {"PDL": False}
    pdl = torch.cuda.get_device_capability(device)[0] >= 9
    return {"PDL": pdl, "launch_pdl": pdl}


def positive(q: Tensor, options: Given) -> tuple[Tensor, Given]:
    """Return queries and a positive scale that make the same scores: maxima come before scaling."""
    if options.scale > 0:
        return q, options
    if options.scale < 0:
        return -q, replace(options, scale=-options.scale)
    return torch.zeros_like(q), replace(options, scale=1.0)


def starts(options: Options, unused: Tensor) -> list[Tensor]:
    """Return where packed sequences start; a tensor that is not used still needs a pointer."""
    return [unused if x is None else x for x in options.packed_starts.values()]


def numbers(options: Options) -> tuple[int, float, float]:
    """Return the number of packed sequences, the scale and the softcap."""
    return options.sequences, options.scale, options.softcap or 0.0


def width(x: Tensor) -> str:
    """Return which of two launches scores summaries: ``wide`` for fp32 and those of more than 256 bytes."""
    return "narrow" if x.element_size() == 2 and x.shape[3] <= 128 else "wide"
