"""What a rule takes of a row of scores that a program holds, as `Rule.choose` says it: no sort, no mask."""

# Triton reads annotations such as `tl.constexpr`, whose module may be missing.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

from seerattention.ops.language import jit, tl

#: Kinds of rules; kernels get a kind's place.
KINDS = ("share", "count", "mass")


@jit
def take(score, valid, always, value, KIND: tl.constexpr):
    """Mark the blocks of a row that a rule takes besides those always read, which it may mark too.

    ``score`` is -inf where a block is not ``valid``: there it takes no part in the softmax either.
    """
    if KIND == 1:
        # Those read anyway are the first of the count.
        free = valid & (always == 0)
        room = tl.cast(value, tl.int32) - tl.sum(always.to(tl.int32), 0)
        taken = _best(_order(score), free.to(tl.int32), 1, room, free)
    else:
        # Where nothing is valid nothing has a share.
        share = tl.where(valid, tl.exp(score - tl.maximum(tl.max(score, 0), -3e38)), 0.0)
        share /= tl.maximum(tl.sum(share, 0), 1e-30)
        if KIND == 0:
            taken = share > value
        else:
            # Bits of floats >= 0 are in the floats' order.
            taken = _best(share.to(tl.uint32, bitcast=True), share, 0, value, valid)
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
def _best(key, weight, tied: tl.constexpr, limit, free):
    """Take free blocks from the largest key down while those before weigh less than ``limit``.

    ``tied`` is the weight of every block of a tie, 0 where it is the key itself, as a float.
    """
    # The smallest key such that all larger ones weigh less than the limit, from its highest bit down; or
    # else any such that they weigh exactly as much, which ends most searches early.
    found = tl.full([], 0, tl.uint32)
    bit = tl.full([], 1 << 31, tl.uint32)
    while bit > 0:
        most = found | (bit - 1)
        before = tl.sum(tl.where(key > most, weight, 0), 0)
        found = tl.where(before == limit, most, tl.where(before > limit, found | bit, found))
        bit = tl.where(before == limit, 0, bit >> 1)
    before = tl.sum(tl.where(key > found, weight, 0), 0)
    taken = key > found
    if before < limit:
        tie = ((key == found) & free).to(tl.int32)
        earlier = tl.cumsum(tie, 0) - tie
        if tied == 0:
            earlier = earlier.to(tl.float32) * found.to(tl.float32, bitcast=True)
        taken |= (tie > 0) & (before + earlier < limit)
    return taken
