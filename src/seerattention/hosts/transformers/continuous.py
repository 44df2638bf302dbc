"""Continuous batching: a manager that serves an attached model, and the attention of a batch of its requests.

A batch is one row in which requests lie behind one another, each with tokens of its prompt or one that is
decoded; transformers pages their keys and values and gives those of all requests back, gathered. Nothing is
kept between two batches: summaries of earlier keys are made again from what the pages hold.
"""

from __future__ import annotations

import contextvars
import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from itertools import accumulate, takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import __version__ as host_version
from transformers.generation.continuous_batching import ContinuousBatchingManager

from seerattention.engine.call import Given
from seerattention.engine.layer import SparseLayer
from seerattention.engine.requests import attend_request
from seerattention.hosts.transformers.config import NAME
from seerattention.hosts.transformers.family import has_windows
from seerattention.hosts.transformers.request import LayerCall, Switch
from seerattention.hosts.transformers.support import GRAPHS, KEPT, PAGES, SERVED, STEPS, WINDOWS
from seerattention.ops.dense_attention import dense_attention

#: Keywords by which a batch reaches attention.
BATCH = {
    "block_table",
    "cache",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "logits_indices",
    "logits_processor_args",
    "max_length_k",
    "max_length_q",
    "max_seqlen_k",
    "max_seqlen_q",
    "read_index",
    "write_index",
}

#: By this name of an attention function managers take no graphs and no block tables.
_PLAIN = "paged|eager"


def manager_of(
    model: PreTrainedModel, switch: Switch, attached: Callable[[], bool], args: Any, kwargs: dict[str, Any]
) -> ContinuousBatchingManager:
    """Return what a model's ``init_continuous_batching`` does, made to serve what is attached.

    Args:
        model: The model.
        switch: Says what computes its attention.
        attached: Whether the same is still attached.
        args: For ``init_continuous_batching``.
        kwargs: For the same.

    Raises:
        NotImplementedError: If a decode policy is in use, cached keys cannot be rotated back, or graphs,
            compilation or batches that overlap are asked for, or with sliding windows transformers is 5.15.
        RuntimeError: If this version of transformers is another one than those known.
        ValueError: If there is a manager kept from before that serves otherwise.
    """
    kind: Any = type(model)
    kept, dense = _kept(model), switch.mode.handler is None
    if kept is not None and getattr(kept, "seerattention", None) is not (None if dense else switch):
        raise ValueError(KEPT)
    if dense:
        made = kind.init_continuous_batching(model, *args, **kwargs)
        # It computes in a thread of its own, which is to be dense as well.
        loop = made._run_generation_loop
        made._run_generation_loop = functools.partial(contextvars.copy_context().run, loop)
        return made
    if has_windows(model.config.get_text_config()) and host_version.startswith("5.15."):
        raise NotImplementedError(f"{WINDOWS}, and this is {host_version}")
    _refuse_layer(switch.handler)
    given = inspect.signature(kind.init_continuous_batching).bind(model, *args, **kwargs).arguments
    _refuse_options(given.get("continuous_batching_config"))
    manager: Any = kind.init_continuous_batching(_Named(model, _PLAIN), *args, **kwargs)
    if manager is kept:
        return manager
    manager.model = model
    _refuse_options(manager.continuous_batching_config)
    manager.seerattention = switch
    names = ("_run_generation_loop", "_generation_step", "_create_batch_processor")
    serve, step, process = (_found(manager, name) for name in names)

    def run(**options: Any) -> None:
        # While it runs nobody may detach.
        with switch.within():
            serve(**options)

    def one_step() -> None:
        if not attached():
            raise RuntimeError("what this manager serves was detached; make a new one")
        _refuse_layer(switch.handler)
        requests = _found(manager.batch_processor.inputs_and_outputs, "requests_in_batch")
        prompts = tuple(_prompt_tokens(one.state) for one in requests)
        with switch.within(handler=switch.handler, prompts=prompts):
            step()

    def create() -> Any:
        # By a name that it does not know it makes no mask: `[tokens of a batch, tokens of the cache]`.
        manager.model = _Named(model, NAME)
        try:
            made = process()
        finally:
            manager.model = model
        # One that is kept comes again.
        if made is not manager.batch_processor:
            _Pieces(made.scheduler, made.cache.max_batch_tokens, switch)
        return made

    manager._run_generation_loop, manager._generation_step = run, one_step
    manager._create_batch_processor = create
    return manager


class _Pieces:
    """Makes a scheduler end pieces of prompts where blocks do, and share pages until what chooses changes.

    What is left of a batch may be too little for that. Then a request takes nothing and is the last of the
    batch, unless it is the first.

    Args:
        scheduler: The scheduler.
        most: Tokens of a batch.
        switch: Says what is attached.
    """

    def __init__(self, scheduler: Any, most: int, switch: Switch) -> None:
        self.most, self.switch, self.full = most, switch, False
        self.cache, self.chose = _found(scheduler, "cache"), switch.handler
        self.own_process = _found(scheduler, "_process_candidates")
        self.own_schedule = _found(scheduler, "_schedule_request")
        scheduler._process_candidates, scheduler._schedule_request = self.process, self.schedule

    def process(self, candidates: Iterable[Any], *more: Any) -> Any:
        """Fill a batch with requests until one takes nothing."""
        self.full = False
        if self.switch.handler is not self.chose:
            # Pages of earlier requests hold what was chosen by another policy: they are not found, nor, in
            # older versions, taken in place of those that were computed anew.
            self.cache.use_prefix_sharing = self.cache.allow_block_sharing = False
        return self.own_process(takewhile(lambda _: not self.full, candidates), *more)

    def schedule(self, state: Any, tokens: list[int], budget: int, *more: Any) -> None:
        """Give a request its place: of the tokens that it still has as many as the budget, or fewer."""
        if budget < len(tokens):
            layer = self.switch.handler
            assert isinstance(layer, SparseLayer)
            block, past = layer.row_tokens, state.position_offset
            whole = (past + budget) // block * block - past
            if whole > 0 or budget < self.most:
                budget = max(whole, 0)
            self.full = budget == 0
        self.own_schedule(state, tokens, budget, *more)


def forget_manager(model: PreTrainedModel, switch: Switch) -> None:
    """Destroy a manager that was kept for the next session if it serves what is being detached."""
    kept = _kept(model)
    if getattr(kept, "seerattention", None) is switch:
        kept.model.destroy_cached_continuous_batching_manager()


def _kept(model: PreTrainedModel) -> Any:
    return model.__dict__.get("_cached_continuous_batching_manager")


def _found(thing: Any, name: str) -> Any:
    """Return what transformers may have renamed."""
    if not hasattr(thing, name):
        raise RuntimeError(f"{type(thing).__name__} has no {name} with transformers {host_version}; {SERVED}")
    return getattr(thing, name)


def _prompt_tokens(state: Any) -> int:
    """Return the length of a request's prompt, without tokens generated before it had to begin again."""
    return state._true_initial_tokens or len(state.initial_tokens)


class _Named:
    """A model as a manager is to see it: attending by the function of this name. The model itself stays."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self._own, self.config = model, copy.deepcopy(model.config)
        self.config._attn_implementation = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def eval(self) -> Any:
        """Do what the model does."""
        self._own.eval()
        return self


def _refuse_layer(layer: Any) -> None:
    """Refuse what is attached where batches cannot be computed with it."""
    assert isinstance(layer, SparseLayer)
    if layer.decode.policy is not None:
        raise NotImplementedError(STEPS)
    reads = any(not scorer.after_rope for scorer in layer.prefill.scorers.values())
    if layer.prefill.policy is not None and reads and layer.unrotate.why_not is not None:
        raise NotImplementedError(f"{PAGES}: {layer.unrotate.why_not}")


def _refuse_options(config: Any) -> None:
    """Refuse options of continuous batching that need whole graphs, or several batches at once."""
    if config is None:
        return
    graphs = config.use_cuda_graph
    asked = {
        "use_cuda_graph": any(graphs) if isinstance(graphs, tuple) else graphs,
        "varlen_compile_config": config.varlen_compile_config,
        "decode_compile_config": config.decode_compile_config,
        "use_async_batching": config.use_async_batching,
    }
    if named := [name for name, value in asked.items() if value]:
        raise NotImplementedError(f"{', '.join(named)}: {GRAPHS}")


def gathered(cache: Any, layer: int, k: Tensor, v: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Give a paged cache a batch's new keys and values, and return those of all requests.

    Args:
        cache: The cache; None where the module gave it them, as from transformers 5.24 on.
        layer: Layer index.
        k: ``[1, Hk, T, D]``.
        v: ``[1, Hk, T, D]``.
        kwargs: What attention was called with; the cache may change it.

    Returns:
        Keys and values, ``[1, Hk, Tk, D]`` each.
    """
    if cache is None:
        return k, v
    if _takes_kwargs(type(cache)):
        return cache.update(k, v, layer, kwargs=kwargs)
    # Before 5.19 by token, not by head.
    k, v = cache.update(k, v, layer, read_index=kwargs["read_index"], write_index=kwargs["write_index"])
    return k.transpose(0, 1)[None], v.transpose(0, 1)[None]


@functools.cache
def _takes_kwargs(kind: Any) -> bool:
    return "kwargs" in inspect.signature(kind.update).parameters


def _lengths_of(call: LayerCall, batch: dict[str, Any], window: int | None) -> list[tuple[int, int]]:
    """Return (new tokens, keys) of every request in a layer; waits for the device once per pass and kind."""
    kind = "full_attention" if window is None else "sliding_attention"
    if kind not in (known := call.part_of.requests):
        starts_q, starts_k = batch["cu_seq_lens_q"], batch["cu_seq_lens_k"]
        if isinstance(starts_k, dict):
            starts_k = starts_k[kind]
        ends = torch.stack((starts_q.int(), starts_k.int())).diff(dim=1).T.tolist()
        known[kind] = [(new, keys) for new, keys in ends]
    return known[kind]


def attend_requests(
    call: LayerCall,
    given: Given,
    batch: dict[str, Any],
    *,
    window: int | None,
    **options: Any,
) -> Tensor:
    """Compute a layer for the requests of a batch, one after the other.

    Args:
        call: The layer's call.
        given: Tensors of one batch entry, requests behind one another.
        batch: What attention was called with besides, which says where requests begin.
        window: Keys that a query sees in a layer with a sliding window, which is given few others.
        options: For every request, e.g. ``scale``.

    Returns:
        The output, of ``given.q``'s shape.
    """
    layer, part_of = call.taps.layer, call.part_of
    handler, prompts = part_of.mode.handler, part_of.mode.prompts
    lengths = _lengths_of(call, batch, window)
    assert isinstance(handler, SparseLayer)
    assert prompts is not None
    if len(prompts) != len(lengths) or sum(new for new, _ in lengths) != given.q.shape[2]:
        raise RuntimeError(
            f"a batch of {len(prompts)} requests has {len(lengths)} lengths and {given.q.shape[2]} tokens, "
            f"of which they are {sum(new for new, _ in lengths)}"
        )
    q_at = list(accumulate((new for new, _ in lengths), initial=0))
    k_at = list(accumulate((keys for _, keys in lengths), initial=0))
    outs = []
    for row, (new, keys) in enumerate(lengths):
        first_q, first_k = q_at[row], k_at[row]
        ours = [x[:, :, first_q : first_q + new] for x in (given.q, given.q_nope, given.k_nope)]
        k, v = (x[:, :, first_k : first_k + keys] for x in (given.k, given.v))
        if not new:
            # It waits.
            continue
        if window is not None:
            outs.append(dense_attention(ours[0], k, v, window=window, **options))
            continue
        positions = call.given["position_ids"][:, first_q : first_q + new]
        request = Given(ours[0], k, v, *ours[1:])
        ways: dict[str, Any] = {"positions": positions, "chosen": part_of.chosen[row], **options}
        outs.append(attend_request(handler, layer, request, prompts[row], **ways))
    return torch.cat(outs, 2)
