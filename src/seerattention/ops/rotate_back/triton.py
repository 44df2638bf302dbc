"""One read and one write of the vectors, for which operations of torch read and write fp32 copies."""

# Triton reads annotations such as `tl.constexpr`, whose module may be missing.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import torch
from torch import Tensor

from seerattention.ops.language import DTYPES, jit, power_of_two, tl, unsupported_here
from seerattention.rows import num_blocks

#: Tokens of a program, and of how many heads: angles are read once for all of them.
TOKENS, HEADS = 16, 8


def unsupported(x: Tensor, cos: Tensor, sin: Tensor) -> list[str]:
    """Return the reasons why this backend cannot run."""
    reasons = unsupported_here(x)
    if torch.compiler.is_compiling():
        reasons.append("compilers make one kernel of the reference's operations by themselves")
    if torch.is_grad_enabled() and x.requires_grad:
        reasons.append("it has no backward; use backend='reference' for gradients")
    if x.dtype not in DTYPES or cos.dtype not in DTYPES or sin.dtype not in DTYPES:
        reasons.append("x, cos and sin must be float16, bfloat16 or float32")
    return reasons


def run(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Launch the kernel."""
    out = torch.empty_like(x)
    batch, heads, tokens, dim = x.shape
    turns = cos.shape[2]
    together = 1 if cos.shape[0] == 1 else 0
    with torch.cuda.device_of(x):
        _rotate_back[num_blocks(tokens, TOKENS), num_blocks(heads, HEADS), batch](
            x, cos, sin, out, tokens, heads, *x.stride(), *out.stride(),
            0 if together else cos.stride(0), *cos.stride()[1:], 0 if together else sin.stride(0),
            *sin.stride()[1:], HALF=dim // 2, TURNS=turns, PAD=power_of_two(dim // 2), TOKENS=TOKENS,
            HEADS=HEADS, num_warps=4,
        )  # fmt: skip
    return out


@jit("tokens", "heads")
def _rotate_back(
    x,
    cos,
    sin,
    out,
    tokens,
    heads,
    x_b,
    x_h,
    x_t,
    x_d,
    out_b,
    out_h,
    out_t,
    out_d,
    cos_b,
    cos_t,
    cos_d,
    sin_b,
    sin_t,
    sin_d,
    HALF: tl.constexpr,
    TURNS: tl.constexpr,
    PAD: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Rotate some tokens of some heads back."""
    batch = tl.program_id(2).to(tl.int64)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    pair = tl.arange(0, PAD)[None, :]
    inside = (token < tokens) & (pair < HALF)
    turned = (token < tokens) & (pair < TURNS)
    c = tl.load(cos + batch * cos_b + token * cos_t + pair * cos_d, mask=turned, other=1.0).to(tl.float32)
    s = tl.load(sin + batch * sin_b + token * sin_t + pair * sin_d, mask=turned, other=0.0).to(tl.float32)
    stretched = c * c + s * s
    c, s = c / stretched, s / stretched
    x += batch * x_b + token * x_t + pair * x_d
    out += batch * out_b + token * out_t + pair * out_d
    # In long texts heads lie further apart than 32 bits count.
    first = (tl.program_id(1) * HEADS).to(tl.int64)
    for head in range(first, tl.minimum(first + HEADS, heads)):
        a = tl.load(x + head * x_h, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x + head * x_h + HALF * x_d, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + head * out_h, a * c + b * s, mask=inside)
        tl.store(out + head * out_h + HALF * out_d, b * c - a * s, mask=inside)
