"""How Triton kernels of this op are compiled and started."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Launch:
    """How a kernel is compiled and started.

    Attributes:
        block_m: Query tokens per tile; a longer query block is several tiles.
        block_n: Keys per tile; a longer KV block is several tiles.
        warps: Warps per program.
        stages: Steps of the loop over a list that are in flight.
        programs: Programs per multiprocessor.
        registers: Most registers per thread, to let more programs share a multiprocessor; NVIDIA only.
        copies: Whether the copy engine brings tiles, where there is one and the kernel can use it.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    programs: int
    registers: int | None = None
    copies: bool = True

    def options(self) -> dict[str, int]:
        """Return what the compiler is told."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if self.registers and torch.version.hip is None:
            options["maxnreg"] = self.registers
        return options

    def most_programs(self, device: torch.device) -> int:
        """Return how many programs the device runs at a time; in the interpreter, two."""
        if device.type == "cpu":
            return 2
        return self.programs * torch.cuda.get_device_properties(device).multi_processor_count


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is not smaller than ``n``."""
    return 1 << (n - 1).bit_length()
