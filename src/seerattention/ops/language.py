"""One language for the kernels of all ops: Triton or its absence, and the functions that kernels share."""

# Triton reads annotations such as `tl.constexpr`, whose module may be missing.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor


def _find(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


#: Both None where Triton is not installed; kernels are then plain functions that nobody calls.
triton, tl = _find("triton"), _find("triton.language")

#: Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when this file was imported).
INTERPRETED: bool = triton is not None and bool(triton.knobs.runtime.interpret)

#: What the matrix units of GPUs multiply.
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: Numbers per head that a tile of attention holds at most.
MAX_HEAD_DIM = 256


def jit(*plain: Any) -> Any:
    """Compile a device function: ``@jit``, or ``@jit("tokens", ...)`` with the names of plain integers.

    Plain integers change from call to call; the others are known to the compiler where they are 1 or
    multiples of 16, so that another kernel is compiled where they are not.
    """
    if plain and callable(plain[0]):
        return jit()(plain[0])
    return lambda function: triton.jit(function, do_not_specialize=plain) if triton else function


def unsupported_here(x: Tensor) -> list[str]:
    """Return the reasons why no kernel runs on the device of ``x``."""
    if not x.is_cuda and not (INTERPRETED and x.device.type == "cpu"):
        return ["it needs a GPU"]
    return [] if triton else ["triton is not installed; `pip install triton` brings it"]


def unsupported_on_hopper(device: torch.device, dtype: torch.dtype, kernel: Any) -> list[str]:
    """Return the reasons why a Hopper kernel, None where Gluon is missing, does not run on a device."""
    reasons = []
    if kernel is None:
        reasons.append("triton with the Gluon language (triton >= 3.6) is not installed")
    if device.type != "cuda":
        reasons.append("it needs a Hopper GPU")
    elif not _is_hopper(device):
        reasons.append(f"it needs a Hopper GPU (sm_90), this is {torch.cuda.get_device_name(device)}")
    if dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"its tensor-core products take bfloat16 and float16, not {dtype}")
    return reasons


def cannot_round(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return the reasons why Triton's kernels do not round to a dtype of few bits on a device."""
    if dtype != torch.float8_e4m3fn:
        return [f"it rounds to float8_e4m3fn, not to {dtype}"]
    if device.type == "cuda" and not _is_hopper(device):
        return ["it rounds to float8_e4m3fn on Hopper GPUs (sm_90), where this is multiplied"]
    return []


# A bool, since some compilers of PyTorch cannot compare a constant tuple.
@torch.compiler.assume_constant_result
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def unsupported_dtype(dtype: torch.dtype) -> list[str]:
    """Return the reasons why kernels do not multiply matrices of a dtype."""
    if dtype not in DTYPES:
        return [f"it computes float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"]
    if INTERPRETED and dtype == torch.bfloat16:
        return ["Triton's interpreter multiplies bfloat16 matrices wrongly"]
    return []


def unsupported_attention(q: Tensor, **others: Tensor | None) -> list[str]:
    """Return the reasons why kernels of attention take no such tensors."""
    reasons = unsupported_here(q) + unsupported_dtype(q.dtype)
    if not 1 <= q.shape[3] <= MAX_HEAD_DIM:
        reasons.append(f"head_dim must be at most {MAX_HEAD_DIM}, got {q.shape[3]}")
    return reasons + [
        f"the last dimension of {name} must be contiguous, its stride is {x.stride(-1)}"
        for name, x in {"q": q, **others}.items()
        if x is not None and x.stride(-1) != 1 and x.shape[-1] > 1
    ]


def products(x: Tensor) -> str:
    """How a kernel multiplies matrices of fp32, its ``input_precision``.

    NVIDIA's matrix units come to fp32's accuracy by three products of halves of the digits; without
    them, and where compilers do not offer this, plain fp32 arithmetic does.
    """
    return "tf32x3" if x.is_cuda and torch.version.hip is None else "ieee"


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is not smaller than ``n``."""
    return 1 << (n - 1).bit_length()


def padded(dim: int) -> int:
    """Return the width of the tile that holds vectors of ``dim`` numbers; a product takes 16 at least."""
    return max(power_of_two(dim), 16)


@jit
def wait(PDL: tl.constexpr):
    """Wait for all that the launch before wrote, where `launch.overlapping` started this one.

    Every program does so before it reads what a launch may have written, or writes.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()


@jit
def release(PDL: tl.constexpr):
    """Let the programs of the next launch come, once all of this one are here or done."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@jit
def cap(scores, softcap, EXACT: tl.constexpr):
    """Return ``softcap * tanh(scores / softcap)``, written with exp2, which every target has."""
    x = scores / softcap
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))
    y = (1 - e) / (1 + e)
    y = tl.where(x < 0, -y, y)
    if EXACT:
        # 1 - e cancels for small x; the series is exact to fp32 below 0.3.
        s = x * x
        series = 1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835))))
        y = tl.where(tl.abs(x) < 0.3, x * series, y)
    return softcap * y


@jit
def product(a, b, zero):
    """Return ``a @ b`` of fp32, a chain of additions of its own.

    ``zero`` is a number that the compiler does not know: it turns the sum of something and a product that
    starts at a constant zero into one chain of both, whose rounding errors add up.
    """
    return tl.dot(a, b, tl.zeros([a.shape[0], b.shape[1]], tl.float32) + zero, input_precision="ieee")


@jit
def product_in_parts(q, k, zero, PARTS: tl.constexpr):
    """Return ``q @ k`` in fp32 as a sum of ``PARTS`` products, whose shorter chains round less."""
    if PARTS == 1:
        total = product(q, k, zero)
    else:
        q_even, q_odd = tl.split(tl.reshape(q, [q.shape[0], q.shape[1] // 2, 2]))
        k_even, k_odd = tl.split(tl.permute(tl.reshape(k, [k.shape[0] // 2, 2, k.shape[1]]), (0, 2, 1)))
        total = product_in_parts(q_even, k_even, zero, PARTS // 2)
        total += product_in_parts(q_odd, k_odd, zero, PARTS // 2)
    return total


@jit
def score(q, k, scale):
    """Return ``q @ k``, a sum over the head dimension; any finite ``scale`` does."""
    # The kernel's language has no conditional expression on types.
    if q.dtype == tl.float32:
        scores = product_in_parts(q, k, scale * 0.0, (q.shape[1] + 31) // 32)
    else:
        scores = tl.dot(q, k)
    return scores


@jit
def softmax_start(sinks_ptr, head, unit, ROWS: tl.constexpr, SINKS: tl.constexpr):
    """Return maximum and total of a running softmax that has seen nothing, or only a head's sink.

    ``unit`` is what one unit of the maximum is in natural logarithms.
    """
    if SINKS:
        maximum = tl.zeros([ROWS], dtype=tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) / unit
        total = tl.full([ROWS], 1.0, dtype=tl.float32)
    else:
        maximum = tl.full([ROWS], float("-inf"), dtype=tl.float32)
        total = tl.zeros([ROWS], dtype=tl.float32)
    return maximum, total


@jit
def softmax_step(scores, largest, maximum, total, scale, EXACT: tl.constexpr, HOLES: tl.constexpr):
    """Go on with a running softmax: probabilities, the factor of what was, maximum and total.

    ``scores * scale`` are logarithms to base 2, and so are the maxima; if ``EXACT`` these are left unscaled,
    since scaling a difference rounds less than the difference of two scaled numbers, which is one operation
    shorter. ``HOLES`` says that a row may have seen nothing yet.
    """
    new = tl.maximum(maximum, largest)
    finite = tl.where(new == float("-inf"), 0.0, new) if HOLES else new
    if EXACT:
        p = tl.exp2((scores - finite[:, None]) * scale)
        fade = tl.exp2((maximum - finite) * scale)
    else:
        p = tl.exp2(scores * scale - finite[:, None])
        fade = tl.exp2(maximum - finite)
    return p, fade, new, total * fade + tl.sum(p, 1)


@jit
def add_product(total, weights, x, scale):
    """Return ``total + weights @ x``, the weights rounded to the type of ``x``; any finite ``scale`` does."""
    if x.dtype == tl.float32:
        # A sum per product and then their sum: in one chain of all the rounding errors would add up.
        total += product(weights, x, scale * 0.0)
    else:
        total = tl.dot(weights.to(x.dtype), x, total)
    return total


@jit
def load_tile(pointer, stride, first, inside, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load ``[ROWS, BLOCK_D]`` from token ``first`` on, zeros past ``inside`` tokens."""
    places, dims = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    # 64 bits for where a tile starts, 32 within it.
    tile = pointer + tl.cast(first, tl.int64) * stride + (places[:, None] * stride + dims[None, :])
    here = (places < inside)[:, None]
    if D != BLOCK_D:
        here = here & (dims < D)[None, :]
    return tl.load(tile, mask=here, other=0.0)


@jit
def store_tile(pointer, stride, first, inside, x, D: tl.constexpr):
    """Store ``x`` from token ``first`` on, but for rows past ``inside`` tokens."""
    places, dims = tl.arange(0, x.shape[0]), tl.arange(0, x.shape[1])
    tile = pointer + tl.cast(first, tl.int64) * stride + (places[:, None] * stride + dims[None, :])
    here = (places < inside)[:, None] & (dims < D)[None, :]
    tl.store(tile, x.to(pointer.dtype.element_ty), mask=here)


@jit
def sequence_of(
    unit, unit_starts, starts, num_queries, num_keys,
    UNIT: tl.constexpr, BLOCK_Q: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """Find the packed sequence of a unit of ``UNIT`` tokens; ``SEQUENCES`` is 0 where nothing is packed.

    ``starts`` holds `Rows.starts_q`, `Rows.starts_k` and the number of sequences; ``unit_starts`` is the one
    of the two that units are counted in. Returns the unit's number in its sequence, the sequence's first
    row of ``BLOCK_Q`` queries, and its first query, queries, first key and keys.
    """
    first_row, start_q, len_q, start_k, len_k = 0, 0, num_queries, 0, num_keys
    if SEQUENCES > 0:
        starts_q, starts_k, sequences = starts
        s = tl.arange(0, SEQUENCES)
        here = s < sequences
        tokens = tl.load(unit_starts + s + 1, mask=here, other=0) - tl.load(
            unit_starts + s, mask=here, other=0
        )
        units = (tokens + UNIT - 1) // UNIT
        before = (tl.cumsum(units, 0) <= unit) & here
        which = tl.sum(before.to(tl.int32), 0)
        unit -= tl.sum(tl.where(before, units, 0), 0)
        queries = tl.load(starts_q + s + 1, mask=here, other=0) - tl.load(starts_q + s, mask=here, other=0)
        first_row = tl.sum(tl.where(before, (queries + BLOCK_Q - 1) // BLOCK_Q, 0), 0)
        # Past the last sequence there is nothing.
        inside = which < sequences
        start_q = tl.load(starts_q + which, mask=inside, other=0)
        len_q = tl.load(starts_q + which + 1, mask=inside, other=0) - start_q
        start_k = tl.load(starts_k + which, mask=inside, other=0)
        len_k = tl.load(starts_k + which + 1, mask=inside, other=0) - start_k
    return unit, first_row, start_q, len_q, start_k, len_k


@jit
def best_products(
    queries, keys, row, column, last_q, last_k, E: tl.constexpr, E_PAD: tl.constexpr,
    SUBS_Q: tl.constexpr, SUBS_K: tl.constexpr, RESIDENT: tl.constexpr, PRECISION: tl.constexpr,
    KEEP: tl.constexpr, latest, KEY_TOKENS: tl.constexpr,
):  # fmt: skip
    """Return block pairs' largest products over their pairs of summaries, and with KEEP the pairs' numbers.

    ``row`` and ``column`` are the blocks of a tile. Summaries of ``E`` numbers lie behind one another from
    ``queries`` and ``keys`` on, the last of them ``last_q`` and ``last_k``. A query block's are held
    ``RESIDENT`` at a time. With ``KEY_TOKENS``, how many a summary of keys is of, none counts that begins
    after the row's ``latest``.
    """
    e = tl.arange(0, E_PAD)
    # One product per pair of places within a block: the maximum over sub-blocks is then one between whole
    # tiles. A short last block repeats its last summary: equal to an earlier pair, it never wins.
    best = tl.full([row.shape[0], column.shape[0]], float("-inf"), tl.float32)
    winner = tl.full(best.shape, SUBS_Q * SUBS_K, tl.int32)
    for held in range(0, SUBS_Q, RESIDENT):
        parts = ()
        for sub in tl.static_range(RESIDENT):
            at_q = queries + tl.minimum(row * SUBS_Q + held + sub, last_q)[:, None] * E
            query = tl.load(at_q + e[None, :], mask=(e < E)[None, :], other=0.0)
            parts = parts + (query,)  # noqa: RUF005, Triton has no stars
        for sub_k in range(SUBS_K):
            at_k = keys + tl.minimum(column * SUBS_K + sub_k, last_k)[None, :] * E
            key = tl.load(at_k + e[:, None], mask=(e < E)[:, None], other=0.0)
            for sub in tl.static_range(RESIDENT):
                product = tl.dot(parts[sub], key, input_precision=PRECISION)
                if KEY_TOKENS > 0:
                    begins = (column * SUBS_K + sub_k) * KEY_TOKENS
                    product = tl.where(begins[None, :] <= latest[:, None], product, float("-inf"))
                if KEEP:
                    pair = (held + sub) * SUBS_K + sub_k
                    better = (product > best) | ((product == best) & (winner > pair))
                    winner = tl.where(better, pair, winner)
                best = tl.maximum(best, product)
    return best, winner
