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
def take(score, valid, always, read, value, KIND: tl.constexpr, BITS: tl.constexpr):
    """Mark the blocks of a row that are always read and those that a rule takes besides.

    ``score`` is -inf where a block is not ``valid``: there it takes no part in the softmax either. Of a count
    scores may be int32, logarithms of shares in steps, and any where a block is not valid. ``read`` are how
    many are always read, the first of a count.
    """
    if KIND == 1 and score.dtype == tl.int32:
        # Above all shares are those always read. No two keys are alike, so that no search ends among several.
        key = tl.where(valid, _order(tl.where(always, 2, tl.minimum(score, 1))), 0)
        found, _ = _limit(key, tl.maximum(tl.cast(value, tl.int32), read), BITS)
        return key > found
    if KIND == 1:
        room = tl.cast(value, tl.int32) - read
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
    return (taken & valid) | always


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
    """Unsigned integers above 0 in the order of the scores: -0 and 0 alike; of int32 the left ones first."""
    if score.dtype == tl.int32:
        WIDTH: tl.constexpr = score.shape[0]
        from_right = tl.arange(0, WIDTH) ^ (WIDTH - 1)
        return ((score + (2**15 + 1)).to(tl.uint32) * WIDTH) | from_right.to(tl.uint32)
    image = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    # Negative floats count down: flip all their bits, and only the sign of the others.
    flip = (image >> 31) | -0x80000000
    return (image ^ flip).to(tl.uint32, bitcast=True)


@jit
def _above(key, weight, most):
    """Return what the blocks weigh whose key is larger than ``most``."""
    return tl.sum(tl.where(key > most, weight, 0.0), 0)


@jit
def _limit(key, limit, BITS: tl.constexpr):
    """Return the smallest key that fewer than ``limit`` are larger than, and how many are larger than it.

    Or else any that exactly as many are larger than, which ends most searches early. One sum, whose digits
    count, compares with three keys at a time, or with two in a long row. With ``BITS`` 1 the search begins
    between the row's own keys: two sums for the seven or so that sign and exponent would take.
    """
    LONG: tl.constexpr = key.shape[0] > 512
    DIGIT: tl.constexpr = 16 if LONG else 10
    MASK: tl.constexpr = (1 << DIGIT) - 1
    low, high = tl.full([], 0, tl.uint32), tl.full([], 0xFFFFFFFF, tl.uint32)
    if BITS == 1:
        # 0, which is not taken, counts as the largest.
        low, high = tl.min(key - 1, 0), tl.max(key, 0)
    all_above = low
    # None is left where the limit is not above 0.
    low = tl.where(limit > 0, low, high)
    before = tl.full([], 0, tl.int32)
    while low < high:
        span = high - low
        part = span // 3 if LONG else span // 4
        # Nothing is searched where all are taken.
        first = tl.where(low == all_above, low, low + part)
        middle = low + span // 2
        last = high - 1 - part
        counts = (key > first).to(tl.int32) + ((key > last).to(tl.int32) << DIGIT)
        if not LONG:
            counts += (key > middle).to(tl.int32) << 20
        counts = tl.sum(counts, 0)
        above_first, above_last = counts & MASK, (counts >> DIGIT) & MASK
        # The first of these that fewer are larger than, if any, is the new upper end.
        if LONG:
            above_middle = above_first
            middle = first
        else:
            above_middle = counts >> 20
        if above_first <= limit:
            high, before = first, above_first
        elif above_middle <= limit:
            low, high, before = first + 1, middle, above_middle
        elif above_last <= limit:
            low, high, before = middle + 1, last, above_last
        else:
            low = last + 1
        low = tl.where(before == limit, high, low)
    return high, before


@jit
def _best(key, weight, limit, COUNT: tl.constexpr, BITS: tl.constexpr):
    """Take blocks from the largest key down while those before weigh less than ``limit``.

    Blocks whose key is 0 are not taken. Each weighs one if ``COUNT``, ``weight`` else: then the weight of
    blocks that tie is their key, as a float.
    """
    if COUNT:
        found, before = _limit(key, limit, BITS)
    else:
        # By digits from the highest on; exact ones end the search as in `_limit`.
        found = tl.full([], 0, tl.uint32)
        shift = tl.full([], 32 - BITS, tl.int32)
        while shift >= 0:
            if BITS == 1:
                before = _above(key, weight, found + ((1 << shift) - 1).to(tl.uint32, bitcast=True))
                digit = (before >= limit).to(tl.int32)
                exact = before == limit
            else:
                digits = tl.arange(0, 1 << BITS)
                most = found + (((digits + 1) << shift) - 1).to(tl.uint32, bitcast=True)
                before = _above(key[:, None], weight[:, None], most[None, :])
                digit = tl.sum((before >= limit).to(tl.int32), 0)
                exact = tl.sum((before == limit).to(tl.int32), 0) > 0
            # All of them are left where the limit is not above 0.
            step = tl.where(exact, (digit << shift) - 1, tl.minimum(digit, (1 << BITS) - 1) << shift)
            found += step.to(tl.uint32, bitcast=True)
            shift = tl.where(exact, -1, shift - BITS)
        before = _above(key, weight, found)
    larger = key > found
    if before < limit:
        tie = (key == found) & (key > 0)
        if COUNT and BITS == 1:
            larger |= tie & (tl.arange(0, key.shape[0]) < _place(tie, limit - before))
        else:
            earlier = tl.cumsum(tie.to(tl.int32), 0) - tie.to(tl.int32)
            if not COUNT:
                earlier = earlier.to(tl.float32) * found.to(tl.float32, bitcast=True)
            larger |= tie & (before + earlier < limit)
    return larger


@jit
def _place(marks, count):
    """Return the place after the first ``count`` marks of a row, its end if there are fewer.

    A search: a sum of all before each place is fewer steps, but takes twice the registers.
    """
    place = tl.arange(0, marks.shape[0])
    low, high = tl.full([], 0, tl.int32), tl.full([], marks.shape[0], tl.int32)
    while low < high:
        middle = (low + high) // 2
        if tl.sum((marks & (place < middle)).to(tl.int32), 0) < count:
            low = middle + 1
        else:
            high = middle
    return low
