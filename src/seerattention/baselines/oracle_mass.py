"""Oracle by mass: the attention that each block truly gets, summed instead of its largest weight.

For a given number of blocks per row no selection keeps more attention. It costs as much as dense
attention: an upper bound on recall, not a method.

Source: the softmax map of scaled dot-product attention (arXiv 1706.03762, equation 1), summed; `oracle`
takes the maximum, as the gates' target does (SeerAttention, section 3.2, arXiv 2410.13276).
"""

from __future__ import annotations

from functools import partial

from seerattention.baselines.oracle import Oracle

create = partial(Oracle, pool="sum")
