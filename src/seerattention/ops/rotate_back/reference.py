"""The specification, in operations of torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.ops.dispatch import runs_everything

unsupported = runs_everything


def run(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the vectors before the rotation."""
    wide = torch.promote_types(cos.dtype, torch.float32)
    still = x.shape[3] // 2 - cos.shape[2]
    cos, sin = F.pad(cos.to(wide), (0, still), value=1.0), F.pad(sin.to(wide), (0, still))
    # Once for all heads.
    stretched = cos.square() + sin.square()
    cos, sin = ((angle / stretched)[:, None] for angle in (cos, sin))
    exact = x.to(wide)
    first, second = exact.chunk(2, -1)
    turned = torch.cat((second, -first), -1)
    return torch.addcmul(exact * torch.cat((cos, cos), -1), turned, torch.cat((sin, sin), -1)).to(x.dtype)
