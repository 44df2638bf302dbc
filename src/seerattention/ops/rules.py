"""What a rule takes of a row of scores that a program holds, as `Rule.choose` says it: no sort, no mask."""

# Triton reads annotations such as `tl.constexpr`, whose module may be missing.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

from seerattention.ops.language import jit, tl

#: Kinds of rules; kernels get a kind's place.
KINDS = ("share", "count", "mass")

#: Longest row: a program keeps it in registers.
MAX_BLOCKS = 32768


def digit_bits(blocks: int, warps: int) -> int:
    """Return how many bits of its limit a row that others wait for settles at a time.

    As many as leave the row in registers: fewer passes, more work. Where many rows keep a device busy, one.
    """
    return 4 if blocks <= 128 * warps else 2 if blocks <= 512 * warps else 1


@jit
def take(score, valid, always, value, KIND: tl.constexpr, BITS: tl.constexpr):
    """Mark the blocks of a row that a rule takes besides those always read, which it may mark too.

    ``score`` is -inf where a block is not ``valid``: there it takes no part in the softmax either.
    """
    if KIND == 1:
        # Those read anyway are the first of the count.
        room = tl.cast(value, tl.int32) - tl.sum(always.to(tl.int32), 0)
        taken = _best(tl.where(valid & (always == 0), _order(score), 0), score, room, True, BITS)
    else:
        # Where nothing is valid nothing has a share.
        share = tl.where(valid, tl.exp(score - tl.maximum(tl.max(score, 0), -3e38)), 0.0)
        share /= tl.maximum(tl.sum(share, 0), 1e-30)
        if KIND == 0:
            taken = share > value
        else:
            # Bits of floats >= 0 are in the floats' order.
            taken = _best(share.to(tl.uint32, bitcast=True), share, value, False, BITS)
    return taken & valid


@jit
def store_bits(taken, to, words):
    """Store a row of marks as bits, ``words`` words of 32."""
    WORDS: tl.constexpr = taken.shape[0] // 32
    place = tl.arange(0, 32)[None, :]
    packed = tl.sum(tl.reshape(taken.to(tl.int32), [WORDS, 32]) << place, 1)
    word = tl.arange(0, WORDS)
    tl.store(to + word, packed, mask=word < words)


@jit
def _order(score):
    """Unsigned integers in the order of the scores, -0 and 0 alike."""
    image = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    # Negative floats count down: flip all their bits, and only the sign of the others.
    flip = (image >> 31) | -0x80000000
    return (image ^ flip).to(tl.uint32, bitcast=True)


@jit
def _above(key, weight, most, COUNT: tl.constexpr):
    """Return what the blocks weigh whose key is larger than ``most``."""
    larger = key > most
    return tl.sum(larger.to(tl.int32) if COUNT else tl.where(larger, weight, 0.0), 0)


@jit
def _best(key, weight, limit, COUNT: tl.constexpr, BITS: tl.constexpr):
    """Take blocks from the largest key down while those before weigh less than ``limit``.

    Blocks whose key is 0 are not taken. Each weighs one if ``COUNT``, ``weight`` else: then the weight of
    blocks that tie is their key, as a float.
    """
    # The smallest key such that all larger ones weigh less than the limit, by digits from the highest on;
    # or else any such that they weigh exactly as much, which ends most searches early.
    found = tl.full([], 0, tl.uint32)
    shift = tl.full([], 32 - BITS, tl.int32)
    while shift >= 0:
        if BITS == 1:
            before = _above(key, weight, found + ((1 << shift) - 1).to(tl.uint32, bitcast=True), COUNT)
            digit = (before >= limit).to(tl.int32)
            exact = before == limit
        else:
            digits = tl.arange(0, 1 << BITS)
            most = found + (((digits + 1) << shift) - 1).to(tl.uint32, bitcast=True)
            before = _above(key[:, None], weight[:, None], most[None, :], COUNT)
            digit = tl.sum((before >= limit).to(tl.int32), 0)
            exact = tl.sum((before == limit).to(tl.int32), 0) > 0
        # All of them are left where the limit is not above 0.
        step = tl.where(exact, (digit << shift) - 1, tl.minimum(digit, (1 << BITS) - 1) << shift)
        found += step.to(tl.uint32, bitcast=True)
        shift = tl.where(exact, -1, shift - BITS)
    larger = key > found
    before = _above(key, weight, found, COUNT)
    if before < limit:
        tie = (key == found) & (key > 0)
        earlier = tl.cumsum(tie.to(tl.int32), 0) - tie.to(tl.int32)
        if not COUNT:
            earlier = earlier.to(tl.float32) * found.to(tl.float32, bitcast=True)
        larger |= tie & (before + earlier < limit)
    return larger
