"""A calibration's picture. Needs matplotlib, the extra ``plot``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from seerattention.calibration.search import Outcome
from seerattention.measure.plot import COLOURS, drawn


def draw_calibration(outcome: Outcome, path: Path) -> None:
    """Draw what more or less density would give, and how a calibrated policy shares it among heads."""
    tokens, row = outcome.policy.calibration.tokens, outcome.rows[-1]
    title = f"Calibrated at {tokens:,} tokens"
    with drawn(path, 1, 2, title=title, figsize=(10, 4.2)) as (figure, (left, right)):
        left.plot(
            [p["density"] for p in outcome.curve],
            [p["recall"] for p in outcome.curve],
            "o-",
            color=COLOURS["gate"],
            label="best thresholds, from the true maps",
        )
        rise = row["perplexity"] / row["dense_perplexity"] - 1
        chosen = f"calibrated, measured: perplexity {rise:+.1%}"
        left.plot(row["density"], row["recall"], "*", markersize=14, color=COLOURS["live"], label=chosen)
        left.set_xlabel("density: fraction of blocks read")
        left.set_ylabel("recall: share of attention kept")
        left.grid(alpha=0.3)
        left.set_xlim(left=0)
        left.legend(fontsize=8)
        heads = np.array(outcome.head_densities)
        image = right.imshow(
            heads, cmap="Blues", vmin=0, vmax=heads.max(), interpolation="nearest", aspect="auto"
        )
        layers = sorted(outcome.policy.calibration.laws)
        right.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        right.set_xlabel("head")
        right.set_ylabel("layer")
        figure.colorbar(image, ax=right, label="density of the head")
