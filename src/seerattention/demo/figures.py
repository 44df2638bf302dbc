"""The demo's pictures. Needs matplotlib, the extra ``plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from seerattention.gate import AttnGate
from seerattention.hosts.transformers import AttentionCall, Gates
from seerattention.measure.maps import record_layers, true_map
from seerattention.measure.plot import COLOURS, drawn
from seerattention.policies import TopK, select
from seerattention.rows import Rows


def head_maps(model: PreTrainedModel, gates: Gates, tokens: np.ndarray, policy: TopK) -> list[dict[str, Any]]:
    """Return, for the clearest and the most mixed heads, the true map, the gate's and the selection.

    Args:
        model: The base model, nothing attached.
        gates: Its gates.
        tokens: int ``[T]``.
        policy: What to select by.

    Returns:
        Four heads, each ``{"layer", "head", "true", "gate", "selected"}`` with ``[Nq, Nk]`` arrays.
    """

    def look(call: AttentionCall, gate: AttnGate, scores: Tensor) -> list[dict[str, Any]]:
        true, share, length = true_map(call, gate.block_size), scores.softmax(-1), call.q.shape[2]
        chosen = select(policy, scores, rows=Rows.last(length, length), block_size=gate.block_size).to_mask()
        # Entropy tells sharp heads from diffuse ones.
        spread = -torch.special.xlogy(true, true).sum(-1).mean(-1)[0]
        # A gate may have one score per KV head, for all query heads of its group.
        group = true.shape[1] // scores.shape[1]
        return [
            {
                "layer": call.layer,
                "head": head,
                "spread": float(spread[head]),
                "true": true[0, head].cpu().numpy(),
                "gate": share[0, head // group].cpu().numpy(),
                "selected": chosen[0, head // group].cpu().numpy(),
            }
            for head in range(true.shape[1])
        ]

    layers = record_layers(model, gates, [tokens], look)
    found = [head for (heads,) in layers.values() for head in heads]
    found.sort(key=lambda f: f["spread"])
    picks = np.linspace(0, len(found) - 1, 4).round().astype(int)
    return [found[i] for i in picks]


def draw_maps(maps: list[dict[str, Any]], path: Path) -> None:
    """Draw true map, gate and selection of several heads side by side."""
    titles = ("true map (block maximum)", "what the gate predicts", "blocks read")
    with drawn(path, len(maps), 3, figsize=(9, 2.9 * len(maps))) as (figure, axes):
        for row, found in zip(axes, maps, strict=True):
            n = found["true"].shape[0]
            acausal = np.triu(np.ones((n, n), dtype=bool), 1)
            for axis, key in zip(row, ("true", "gate", "selected"), strict=True):
                values, limits, colours = found[key].astype(float), (0, 1), "Blues"
                if key != "selected":
                    values, limits, colours = np.log10(np.maximum(values, 1e-4)), (-4, 0), "magma"
                image = np.ma.masked_array(values, acausal)
                axis.imshow(image, cmap=colours, vmin=limits[0], vmax=limits[1], interpolation="nearest")
                axis.set_xticks([0, n - 1], ["0", str(n - 1)])
                axis.set_yticks([0, n - 1], ["0", str(n - 1)])
                axis.spines[:].set_visible(False)
            row[0].set_ylabel(f"layer {found['layer']}, head {found['head']}\nquery block")
            bar = figure.colorbar(row[1].images[0], ax=row[:2], shrink=0.8)
            bar.set_ticks([-4, -3, -2, -1, 0], labels=["1e-4", "1e-3", "0.01", "0.1", "1"])
        for axis, title in zip(axes[0], titles, strict=True):
            axis.set_title(title)
        for axis in axes[-1]:
            axis.set_xlabel("KV block")


def draw_quality(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw perplexity against measured density and, where they were asked, the needles found."""
    dense = rows[0]
    gate = sorted((r for r in rows if r["method"] == "SeerAttention"), key=lambda r: r["density"])
    others = [r for r in rows[1:] if r["method"] != "SeerAttention"]
    title = f"Quality against density, {dense['tokens']} tokens"
    labels = {"needle": "needles found (no dense last rows)"} if "needle" in dense else {}
    labels["perplexity"] = "perplexity"
    with drawn(path, 1, len(labels), title=title, figsize=(5 * len(labels), 4.2), squeeze=False) as (_, axes):
        for axis, (key, label) in zip(axes[0], labels.items(), strict=True):
            axis.axhline(dense[key], color=COLOURS["dense"], linestyle="--", linewidth=1, label="dense")
            points = [r["density"] for r in gate], [r[key] for r in gate]
            axis.plot(*points, "o-", color=COLOURS["gate"], label="SeerAttention")
            markers = iter("sv^DPX*")
            for row in others:
                colour = COLOURS["live" if "live" in row["method"] else "other"]
                axis.plot(row["density"], row[key], next(markers), color=colour, label=row["method"])
            axis.set_xlabel("density: fraction of blocks read (measured)")
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
            axis.set_xlim(left=0)
            if key == "needle":
                axis.set_ylim(-0.03, 1.05)
            else:
                # Methods far above the others would flatten the picture.
                axis.set_ylim(top=max(r[key] for r in rows if r["method"] != "random") * 1.01)
        axes[0, 0].legend(fontsize=8)


def draw_time(lengths: list[dict[str, Any]], path: Path) -> None:
    """Draw prefill and attention time against length, dense and sparse."""
    tokens = [r["tokens"] for r in lengths]
    title = f"Prefill time, dense against {lengths[-1]['density']:.0%} density"
    with drawn(path, 1, 2, title=title, figsize=(10, 4.2)) as (_, axes):
        for axis, what, whose in (
            (axes[0], "prefill", "whole model"),
            (axes[1], "attention", "attention of one layer"),
        ):
            for kind, colour in (("dense", COLOURS["dense"]), ("sparse", COLOURS["gate"])):
                axis.plot(tokens, [r[f"{kind}_{what}_s"] for r in lengths], "o-", color=colour, label=kind)
            for row in lengths:
                axis.annotate(
                    f"{row[f'{what}_speedup']:.1f}x",
                    (row["tokens"], row[f"sparse_{what}_s"]),
                    textcoords="offset points",
                    xytext=(0, -14),
                    ha="center",
                    fontsize=8,
                    color=COLOURS["gate"],
                )
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.margins(y=0.12)
            axis.set_xticks(tokens, [f"{t // 1024}k" for t in tokens])
            axis.minorticks_off()
            axis.set_xlabel("tokens")
            axis.set_ylabel("seconds")
            axis.set_title(whose)
            axis.grid(alpha=0.3)
            axis.legend()
