"""Context parallelism of attached models: a KV cache that is spread over processes, and what reads it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import DynamicCache, PreTrainedModel

from seerattention.engine.call import AttentionCall, Cached, Given, Step
from seerattention.engine.layer import Phase, SparseLayer
from seerattention.engine.padding import Lengths, on_device
from seerattention.hosts.transformers.base import device_of, unwrapped
from seerattention.hosts.transformers.family import attention_layers, full_attention_layers
from seerattention.hosts.transformers.request import LayerCall, running
from seerattention.hosts.transformers.rotary import by_length
from seerattention.hosts.transformers.support import (
    SPREAD_CHANGED,
    SPREAD_GATES,
    SPREAD_GRADIENT,
    SPREAD_HEADS,
    SPREAD_MODE,
    SPREAD_ROPE,
    SPREAD_TURN,
    SPREAD_WINDOWS,
)
from seerattention.hosts.transformers.tensor_parallel import processes
from seerattention.parallel.context import Context, gathered
from seerattention.parallel.context_layer import ContextLayer
from seerattention.rows import Rows


class ContextParallelCache(DynamicCache):
    """A KV cache of which every process of a mesh holds a part, for prompts longer than one GPU takes.

    Every process makes one, gives the whole prompt to `prefill`, and then goes on as with any other cache, by
    ``generate`` for instance. Prompts are spread evenly; tokens that follow them are on every process.

    Args:
        model: An attached model, whole on this process's device.
        mesh: One dimension of a mesh: the processes that share the prompt. The device that it was made
            for must be the model's.

    Raises:
        NotImplementedError: If the model has sliding windows, a RoPE whose angles depend on the length of
            the text, or heads that are spread over processes.
        ValueError: If nothing is attached, or the mesh does not fit.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh) -> None:
        base = unwrapped(model)
        refuse_spreading(base)
        if mesh.ndim != 1:
            raise ValueError(
                f"a prompt is spread over one dimension of a mesh, this one has {mesh.ndim}: "
                f"{mesh.mesh_dim_names}; give mesh[name]"
            )
        device = device_of(base)
        if mesh.device_type != device.type:
            raise ValueError(
                f"the model is on {device} and the mesh is of {mesh.device_type} devices; make the mesh with "
                f"init_device_mesh({device.type!r}, ...)"
            )
        super().__init__(config=base.config)
        self.group = mesh.get_group()
        self.columns = 0
        self.context: Context | None = None
        self.of_layers: dict[int, ContextLayer] = {}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, layer: SparseLayer, lengths: list[int], columns: int, piece_tokens: int) -> Context:
        """Get ready for prompts of so many tokens, in rows of so many columns, given in such pieces."""
        if self.context is not None:
            raise NotImplementedError(SPREAD_TURN)
        phases: list[Phase] = [layer.prefill, layer.decode]
        if any(phase.shared for phase in phases):
            raise NotImplementedError(SPREAD_GATES)
        sizes = {size for phase in phases for scorer in phase.scorers.values() for size in scorer.block_size}
        context = Context(self.group, math.lcm(*sizes), lengths)
        if (least := context.unit // context.size) > piece_tokens:
            raise ValueError(
                f"{context.size} processes need pieces of at least {least} tokens each, two blocks of "
                f"{context.block}, got piece_tokens={piece_tokens}"
            )
        self.context, self.columns = context, columns
        return context

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens all processes have of a layer, a padded batch's columns."""
        held = getattr(self.layers[layer_idx], "keys", None) if layer_idx < len(self.layers) else None
        if self.context is None or not isinstance(held, Tensor):
            return 0
        return self.columns + held.shape[2] - self.context.own_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return how many columns a mask has, those of all processes, and that none is before them."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def update(self, key_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add a layer's new keys and values to those of this process."""
        if not isinstance(call := running(), LayerCall) or not isinstance(
            call.part_of.mode.handler, SparseLayer
        ):
            raise NotImplementedError(SPREAD_MODE)
        if self.context is None:
            raise ValueError(
                "a prompt comes to a ContextParallelCache by prefill(model, input_ids, cache); generate goes "
                "on from there"
            )
        if len(key_states) != len(self.context.lengths):
            raise NotImplementedError(SPREAD_CHANGED)
        return super().update(key_states, *args, **kwargs)

    def check_places(self, new: int, positions: Tensor | None, mask: Tensor | None) -> None:
        """Refuse new tokens that are not at the places that follow their prompts.

        Nothing else would tell: a spread cache reads what it holds, whatever a mask says.

        Args:
            new: New tokens.
            positions: Their position ids, ``[B or 1, new]``; None counts a batch's columns.
            mask: Which tokens are real, ``[B, columns]``.

        Raises:
            NotImplementedError: If the batch has other rows.
            ValueError: If they are elsewhere.
        """
        if self.context is None or (following := self.get_seq_length() - self.columns) < 0:
            # A piece of the prompt.
            return
        known = [n + following for n in self.context.lengths]
        first = [self.columns + following] if positions is None else positions[:, 0].tolist()
        if len(first) not in (1, len(known)):
            raise NotImplementedError(SPREAD_CHANGED)
        if len(first) == 1:
            first *= len(known)
        real = known if mask is None else (mask.bool().sum(1) - new).tolist()
        if not first == known == real:
            raise ValueError(
                f"this cache holds {known} tokens of its rows, and {new} more come at positions {first}, by "
                f"the mask after {real}; give generate what prefill was given and at least a token more, "
                "with an attention_mask of both, and a model that is called by itself the position_ids too"
            )

    def reset(self) -> None:
        """Forget the prompt and what followed it, for another one."""
        layers: list[Any] = self.layers
        for layer in layers:
            # Not as some versions do it, which keep the tensors and write zeros into them.
            layer.keys = layer.values = None
            layer.is_initialized = False
        self.context, self.columns = None, 0
        self.of_layers.clear()

    def _changed(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(SPREAD_CHANGED)

    crop = reorder_cache = batch_repeat_interleave = batch_select_indices = __reduce_ex__ = _changed


def attend_spread(
    call: LayerCall, cache: ContextParallelCache, given: Given, options: dict[str, Any]
) -> Tensor:
    """Return what attention over a spread cache gives this process, of ``given.q``'s shape.

    Args:
        call: The layer's call.
        cache: The KV cache, which holds the new keys already.
        given: Queries and new keys, and all keys and values that this process has.
        options: Scale, soft-cap and sinks.
    """
    handler, layer, context = call.part_of.mode.handler, call.taps.layer, cache.context
    assert isinstance(handler, SparseLayer)
    assert context is not None
    own = cache.of_layers.setdefault(layer, ContextLayer(context))
    new, following = given.q.shape[2], given.k.shape[2] - context.own_tokens
    if given.q.requires_grad:
        raise NotImplementedError(SPREAD_GRADIENT)
    if not following:
        rows = Rows.last(new, given.k.shape[2])
        return own.prefill(handler, AttentionCall(layer, given, rows, **options), cache.stream)
    if new >= handler.row_tokens:
        raise NotImplementedError(SPREAD_TURN)
    known = [n + following for n in context.lengths]
    lengths = Lengths(on_device(known, given.q.device).int(), None, [0] * len(known), known, None)
    step = Step(
        layer, given, lengths, own, Cached(), _no_call, **options, columns=max(*known, context.tokens)
    )
    return own.decode(handler, step)


def refuse_spreading(model: PreTrainedModel) -> None:
    """Refuse models whose texts processes cannot share.

    Raises:
        NotImplementedError: If this is one.
    """
    if set(attention_layers(model)) != set(full_attention_layers(model)):
        raise NotImplementedError(f"{type(model).__name__} has layers with windows; {SPREAD_WINDOWS}")
    if (kind := by_length(model.config.get_text_config())) is not None:
        raise NotImplementedError(f"RoPE is of type {kind}; {SPREAD_ROPE}")
    if (sharing := processes(model)) > 1:
        raise NotImplementedError(f"{sharing} processes share this model's heads; {SPREAD_HEADS}")


def _no_call() -> AttentionCall:
    raise AssertionError("a step over a spread cache is computed by its parts")


def refuse_unlike(ids: Tensor, lengths: list[int], piece_tokens: int, group: dist.ProcessGroup) -> None:
    """Refuse prompts that differ between processes, or pieces of them.

    Args:
        ids: ``[B, T]``, every row from the first column on.
        lengths: Of the rows.
        piece_tokens: Tokens per piece.
        group: The processes.

    Raises:
        ValueError: If they do, on every process.
    """
    own = torch.tensor([[*ids.shape, piece_tokens]], device=ids.device)
    every = gathered(own, group)[:, 0]
    if len(every.unique(dim=0)) == 1:
        own = torch.cat((ids, on_device(lengths, ids.device)[:, None]), 1)
        if all(torch.equal(own, other) for other in gathered(own, group)):
            return
    given = " and ".join(f"{rows} x {tokens} by {piece}" for rows, tokens, piece in every.tolist())
    raise ValueError(
        f"every process must be given the same whole prompt, mask and piece_tokens; they have {given} "
        "tokens, or others of the same number"
    )
