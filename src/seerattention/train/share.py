"""How the sequences of a step are shared out over processes, passes and documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from seerattention.hosts.transformers.family import has_windows
from seerattention.train.data import Packed, text_identity

#: A document of fewer blocks teaches nothing: a gate chooses among too few.
LEAST_BLOCKS = 4

#: The tokens of a step: int64 ``[B, T]`` of one document each, or packs of several.
Batch = np.ndarray | Packed

#: Length of every document of a row, and whether it is long enough to be learned from.
Documents = list[tuple[int, bool]]


@dataclass(frozen=True)
class Share:
    """What one process runs of a step's batch.

    Attributes:
        passes: Tokens int64 ``[B, T]`` of each forward pass, and the documents of its rows.
        learned: Tokens of the whole batch, of all processes, in documents that are learned from.
        predicted: Of these, the tokens that have one before them in their document.
    """

    passes: list[tuple[Tensor, Documents]]
    learned: int
    predicted: int


def tokens_of(batch: Batch) -> np.ndarray:
    """Return the tokens of a batch, int64 ``[B, T]``."""
    return batch.tokens if isinstance(batch, Packed) else batch


def identity_of(batches: Callable[[int], Batch]) -> str:
    """Return a fingerprint of all steps; of the first alone where batches are made by an unknown function."""
    if (identity := getattr(batches, "identity", None)) is not None:
        return identity()
    first = batches(0)
    lengths = first.lengths if isinstance(first, Packed) else ()
    return text_identity(*tokens_of(first), *map(np.array, lengths))


def length_of(batches: Callable[[int], Batch]) -> int:
    """Return the tokens of the longest sequences: ``batches.length``, else those of the first step."""
    length = getattr(batches, "length", None)
    return tokens_of(batches(0)).shape[1] if length is None else length


def share_of(batch: Batch, block_size: int, world: int, rank: int, grad_accum: int) -> Share:
    """Return the part of a global batch of process ``rank`` of ``world``, in ``grad_accum`` passes.

    Raises:
        ValueError: If nothing of it can be learned from, or it cannot be split evenly.
    """
    least = LEAST_BLOCKS * block_size
    rows = _documents(batch, least)
    lengths = [length for row in rows for length, counts in row if counts]
    if not lengths:
        raise ValueError(f"the batch is empty or has no document of {LEAST_BLOCKS} blocks ({least} tokens)")
    parts = world * grad_accum
    if len(rows) % parts:
        raise ValueError(
            f"{len(rows)} sequences per step cannot be split evenly over {world} processes x grad_accum "
            f"{grad_accum}; give a multiple of {parts}"
        )
    tokens = torch.from_numpy(np.ascontiguousarray(tokens_of(batch)))
    each = len(rows) // parts
    # Packs differ in their documents, so they go one at a time.
    size = 1 if isinstance(batch, Packed) else each
    start, stop = rank * each * grad_accum, (rank + 1) * each * grad_accum
    passes = [(tokens[s : s + size], rows[s]) for s in range(start, stop, size)]
    return Share(passes, sum(lengths), sum(lengths) - len(lengths))


def decoder_arguments(
    model: PreTrainedModel, positions: Sequence[Tensor], rows: int, device: torch.device
) -> dict[str, Tensor]:
    """Return what tells a decoder where tokens are: nothing where that is 0, 1, 2, ...

    Args:
        model: The decoder's model.
        positions: Of every document of a row those of its tokens, int64 ``[T]`` on the CPU.
        rows: Rows of the batch, all of such documents.
        device: Where the decoder reads its tokens.

    Raises:
        NotImplementedError: If there are several documents and the model has sliding-window layers.
    """
    if len(positions) > 1 and has_windows(model.config.get_text_config()):
        raise NotImplementedError(
            "documents cannot be packed for a model with sliding-window layers: a window would reach into "
            "the document before; train on single windows of text instead (packing off)"
        )
    whole = torch.cat(list(positions))[None]
    tokens = whole.shape[1]
    if torch.equal(whole[0], torch.arange(tokens)):
        return {}
    return {
        "position_ids": whole.to(device),
        # Without a mask that says it is one text, transformers takes gaps for bounds of several.
        "attention_mask": torch.ones(rows, tokens, dtype=torch.long, device=device),
    }


def _documents(batch: Batch, least: int) -> list[Documents]:
    """Return of every row its documents: length, and whether it is long enough to learn from."""
    if isinstance(batch, Packed):
        return [[(n, n >= least) for n in row] for row in batch.lengths]
    if batch.ndim != 2 or not batch.size:
        raise ValueError(f"a batch must be [B, T] and not empty, got {list(batch.shape)}")
    return [[(batch.shape[1], True)]] * len(batch)
