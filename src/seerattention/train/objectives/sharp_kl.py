"""Sharp KL: `kl` against the squared target, so that the blocks with the most attention count more.

Finds more needles at equal cost (docs/method.md).
"""

from __future__ import annotations

from functools import partial

from seerattention.train.objectives.kl import KL

create = partial(KL, power=2.0)
