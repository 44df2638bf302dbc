"""Which tokens of a padded batch are real."""

from __future__ import annotations

from torch import Tensor

from seerattention.hosts.transformers.support import MASKS


def real_tokens(mask: Tensor | None, num_queries: int, num_keys: int) -> list[tuple[Tensor, Tensor]] | None:
    """Find the real tokens of every row of a padded batch.

    Args:
        mask: ``[B, Tk]``, nonzero for real tokens, or None.
        num_queries: Query tokens, the last columns of the mask.
        num_keys: Key tokens, all columns of the mask.

    Returns:
        Per row the indices of its real query tokens and of its real key tokens, or None where nothing
        is padded.

    Raises:
        ValueError: If the mask is not of two dimensions, or does not cover all keys.
    """
    if mask is None:
        return None
    if mask.dim() != 2:
        raise ValueError(f"the attention mask must mark padding, [B, T], got {list(mask.shape)}; {MASKS}")
    if mask.shape[1] != num_keys:
        raise ValueError(
            f"the attention mask covers {mask.shape[1]} tokens, but there are {num_keys}; give one that "
            "covers the tokens already cached too"
        )
    real = mask.bool()
    if bool(real.all()):
        return None
    return [(row[-num_queries:].nonzero()[:, 0], row.nonzero()[:, 0]) for row in real]
