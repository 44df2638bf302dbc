"""Schedulers that end pieces of prompts where the gates' blocks end, so that no block is cut."""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from seerattention.hosts.transformers.checkpoint import load_gates
from seerattention.hosts.vllm.settings import Settings


class Aligned:
    """Schedules as vLLM does, of prompts whole blocks; a request for which none is left waits for a pass.

    Where passes are too small for a block beside all requests that may be decoded, blocks are cut. Goes
    before a scheduler of vLLM's.
    """

    vllm_config: Any
    running: list[Any]
    num_spec_tokens: int
    max_num_scheduled_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = Settings.of(self.vllm_config)
        assert settings is not None
        self.gate_block = load_gates(settings.gates).config.block_size
        # By this vLLM asks how many tokens of a prompt it may take.
        self.need_mamba_block_aligned_split = True

    def _mamba_block_aligned_split(
        self, request: Any, num_new_tokens: int, *cached: int, **cached_too: int
    ) -> int:
        """Return how many of a request's next tokens are scheduled, at most ``num_new_tokens``."""
        begin = request.num_computed_tokens + sum(cached) + sum(cached_too.values())
        end = begin + num_new_tokens
        if end >= request.num_prompt_tokens:
            return num_new_tokens
        whole = max(0, end // self.gate_block * self.gate_block - begin)
        # What is left beside all that may be decoded: if that is no block, waiting would help nobody.
        decoded = len(self.running) * (1 + self.num_spec_tokens)
        return whole or (num_new_tokens if self.max_num_scheduled_tokens - decoded < self.gate_block else 0)


class AlignedScheduler(Aligned, Scheduler):
    """Waits for a pass's tokens before it plans the next."""


class AlignedAsyncScheduler(Aligned, AsyncScheduler):
    """Plans the next pass meanwhile."""
