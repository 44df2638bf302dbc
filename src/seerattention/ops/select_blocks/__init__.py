"""From queries and key summaries to the blocks that each query block reads."""

from __future__ import annotations

from torch import Tensor

from seerattention.ops.dispatch import choose, load_backends
from seerattention.policies import Policy
from seerattention.scorer import Scorer
from seerattention.selection import BlockSelection

BACKENDS = load_backends(__name__, __path__)

#: What ``auto`` tries, in order; on a CPU only the reference, where Triton would be its interpreter.
ORDER = ("triton", "reference")


def select_blocks(
    q: Tensor,
    k_blocks: Tensor,
    scorer: Scorer,
    policy: Policy,
    *,
    positions: Tensor,
    num_keys: int,
    backend: str = "auto",
) -> BlockSelection:
    """Choose the KV blocks that each query block reads.

    Args:
        q: ``[B, Hq, Tq, D]``, the last ``Tq`` of ``num_keys`` tokens; before the rotary embedding,
            or after it if ``scorer.after_rope``.
        k_blocks: Summaries of all ``num_keys`` keys, from ``scorer.compress``.
        scorer: Ranks the blocks.
        policy: Decides how many of them to take.
        positions: int64 ``[Tq]`` or ``[B, Tq]``, the queries' positions.
        num_keys: Key tokens, ``Tk``.
        backend: ``auto``, or a name of ``BACKENDS``, which then runs or raises. Backends choose alike
            but for blocks whose scores are within rounding of the row's limit.

    Returns:
        The selection; never empty, never acausal. No gradient passes it.

    Raises:
        ValueError: If the lengths do not fit or the backend is unknown.
        NotImplementedError: If the backend cannot run this, with its reasons.

    Source: SeerAttention, section 3 (arXiv 2410.13276).
    """
    if not 1 <= q.shape[2] <= num_keys:
        raise ValueError(f"causal attention needs 1 <= Tq <= Tk, got Tq={q.shape[2]} and Tk={num_keys}")
    order = ORDER if q.device.type != "cpu" else ("reference",)
    args = {"q": q, "k_blocks": k_blocks, "scorer": scorer, "policy": policy, "num_keys": num_keys}
    module = choose(BACKENDS, order, backend, **args)
    return module.run(**args, positions=positions)
