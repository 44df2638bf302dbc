"""CUDA graphs of what is done in every step: many small kernels, started at once instead of one by one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    given: tuple[Tensor, ...]
    found: Tensor
    gradients: tuple[Tensor | None, ...]


class Replay:
    """Runs functions that leave gradients, and each one that comes again as a CUDA graph of its kernels.

    The first call of a name runs as it is, which compiles kernels; the second is captured. A graph knows
    nothing but tensors: whatever else a function depends on belongs to its name. On a CPU everything runs as
    it is.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, _Graph | None] = {}
        #: Inputs, shared by the graphs of all layers, which run one after the other.
        self._given: dict[Hashable, tuple[Tensor, ...]] = {}
        self._pool: Any = None

    def __call__(
        self,
        name: Hashable,
        run: Callable[..., Tensor],
        given: Sequence[Tensor],
        learning: Sequence[nn.Parameter],
    ) -> Tensor:
        """Return ``run(*given)``, whose gradients are added to those of the parameters.

        Args:
            name: Of what ``run`` does, tensors apart; given tensors have the same shapes for the same name.
            run: Returns a tensor, adds to the gradients of ``learning`` and waits for nothing on the device.
            given: What it takes.
            learning: The parameters that it adds gradients to.
        """
        if given[0].device.type != "cuda":
            return run(*given)
        if name not in self._graphs:
            self._graphs[name] = None
            return run(*given)
        made = self._graphs[name]
        if made is None:
            made = self._graphs[name] = self._capture(run, given, learning)
        for mine, one in zip(made.given, given, strict=True):
            mine.copy_(one)
        made.graph.replay()
        with torch.no_grad():
            for parameter, gradient in zip(learning, made.gradients, strict=True):
                if gradient is None:
                    continue
                if parameter.grad is None:
                    parameter.grad = gradient.clone()
                else:
                    parameter.grad.add_(gradient)
        return made.found.clone()

    def _capture(
        self, run: Callable[..., Tensor], given: Sequence[Tensor], learning: Sequence[nn.Parameter]
    ) -> _Graph:
        """Record the kernels of a call; nothing is computed."""
        kind = tuple((x.shape, x.dtype) for x in given)
        if kind not in self._given:
            self._given[kind] = tuple(
                torch.empty_like(x, memory_format=torch.contiguous_format) for x in given
            )
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        before, graph = [p.grad for p in learning], torch.cuda.CUDAGraph()
        # Without any, backward makes tensors of its own instead of adding to what a step throws away.
        for parameter in learning:
            parameter.grad = None
        with torch.cuda.device_of(given[0]), torch.cuda.graph(graph, pool=self._pool):
            found = run(*self._given[kind])
        gradients = tuple(p.grad for p in learning)
        for parameter, gradient in zip(learning, before, strict=True):
            parameter.grad = gradient
        return _Graph(graph, self._given[kind], found, gradients)
