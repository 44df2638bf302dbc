"""How Triton kernels are compiled and started."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from seerattention.ops.language import power_of_two


@dataclass(frozen=True)
class Launch:
    """How a kernel is compiled and started.

    Attributes:
        block_m: Queries per tile; a longer query block is several tiles.
        block_n: Keys per tile; a longer KV block is several tiles.
        warps: Warps per program.
        stages: Steps of the loop over keys or a list that are in flight.
        programs: Programs per multiprocessor.
        registers: Most registers per thread, to let more programs share a multiprocessor; NVIDIA only.
        tma: Whether TMA brings tiles, where there is TMA and the kernel can use it.
        direct: Whether threads store what they hold themselves, in PTX, where a kernel can; NVIDIA only.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    programs: int
    registers: int | None = None
    tma: bool = True
    direct: bool = False

    def within(self, queries: int, keys: int) -> Launch:
        """Return the launch with tiles no larger than a block; a product needs 16 queries at least."""
        block_m = min(self.block_m, max(16, power_of_two(queries)))
        return replace(self, block_m=block_m, block_n=min(self.block_n, keys))

    def constants(self) -> dict[str, int]:
        """Return the kernel's sizes and what the compiler is told."""
        given = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "STAGES": self.stages}
        given |= {"num_warps": self.warps, "num_stages": self.stages}
        if self.registers and torch.version.hip is None:
            given["maxnreg"] = self.registers
        return given

    def most_programs(self, device: torch.device) -> int:
        """Return how many programs the device runs at a time; in the interpreter, two."""
        if device.type == "cpu":
            return 2
        return self.programs * torch.cuda.get_device_properties(device).multi_processor_count
