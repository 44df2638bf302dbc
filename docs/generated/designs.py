"""docs/method.md: the designs of gates that were compared."""

from __future__ import annotations

from typing import Any

from generated.reports import FORMER, machine, read
from generated.text import Cells, Report, parts, table, under

Designs = dict[tuple[str, int, float], dict[str, Any]]


def gap(rows: Designs, method: str, tokens: int, asked: float) -> float:
    """Return how far a method's perplexity is from the oracle's, in units of XAttention's distance."""
    one, best, other = (rows[m, tokens, asked]["perplexity"] for m in (method, "oracle", "xattention"))
    return (one - best) / (other - best)


def designs(name: str) -> tuple[Report, Designs, list[str], list[str]]:
    """Return a run of the gate designs, its rows, the gates trained and the other scorers."""
    report = read("gates", f"{name}.json")
    by = {(r["method"], r["tokens"], r["asked"]): r for r in report["rows"]}
    trained = [v["name"] for v in report["variants"]]
    first = ["oracle", "oracle_mass", "xattention"]
    found = [m for m in dict.fromkeys(m for m, *_ in by) if m not in (*first, *trained, "dense")]
    return report, by, trained, [m for m in first if any(key[0] == m for key in by)] + found


def gates(name: str) -> str:
    """Return what one run of the gate designs trained, beside the scorers of that run."""
    report, by, trained, free = designs(name)
    settings, variants = report["settings"], {v["name"]: v for v in report["variants"]}
    steps = {g["group"]: g["rows"][-1]["step"] for g in report["training"]}
    shown = [(n, a) for n in settings["eval_lengths"] for a in settings["densities"]]

    def line(method: str) -> Report:
        v = variants.get(method)
        return {
            "method": method,
            "needles": f"{v['shares']['needles']:.0%}" if v else "",
            "cost": f"{v['cost_32k']:.2%}" if v else "",
            "steps": steps[v["group"]] if v else "",
            "at": [f"{gap(by, method, *at):.2f}, {by[method, *at]['needle']:.0%}" for at in shown],
        }

    return parts(
        f"{settings['batch']:,} tokens per step; `top_k`, the first and the own block read anyway, no "
        f"dense last rows, {report['questions']} questions and {settings['text_tokens']:,} tokens of "
        f"held-out text per cell; {machine(report)}. A cell is the perplexity's gap to the oracle as a "
        "fraction of XAttention's gap, and the needles found:",
        table(
            "method: {method} | needle documents: {needles} | cost at 32k: {cost} | steps: {steps} | "
            + under(f"{n // 1024}k, {a:.0%}" for n, a in shown),
            map(line, [*free, *trained]),
        ),
        FORMER,
    )


def gates_final(name: str, *notes: str) -> str:
    """Return the final gates beside every scorer: perplexity, its gap to the oracle, and needles.

    Seeds of one design, which end in ``, seed K``, are a row together.
    """
    report, by, trained, free = designs(name)
    asked = report["settings"]["densities"]
    kinds: dict[str, list[str]] = {}
    for one in trained:
        kinds.setdefault(one.split(", seed")[0], []).append(one)
    seeds = {f"{kind}, {len(some)} seeds" if len(some) > 1 else kind: some for kind, some in kinds.items()}

    def ends(rows: list[Report], key: str, form: str) -> str:
        values = [r[key] for r in rows]
        return " to ".join(f"{x:{form}}" for x in sorted({min(values), max(values)}))

    def cell(methods: list[str], tokens: int, density: float) -> str:
        rows = [by[m, tokens, density] for m in methods]
        widest = max(gap(by, m, tokens, density) for m in methods)
        share = f" (gap {widest:.2f})" if methods[0] in trained else ""
        return f"{ends(rows, 'perplexity', '.2f')}{share}, {ends(rows, 'needle', '.1%')}"

    lines = []
    for n in report["settings"]["eval_lengths"]:
        dense = Cells().of("{perplexity:.2f}, {needle:.1%}", by["dense", n, 1.0])
        lines.append({"n": n, "name": "dense, all blocks", "at": [dense] + [""] * (len(asked) - 1)})
        for label, methods in [*((m, [m]) for m in free), *((f"**{k}**", some) for k, some in seeds.items())]:
            lines.append({"n": n, "name": label, "at": [cell(methods, n, a) for a in asked]})
    several = "lowest to highest of the gates' seeds, " if any(len(x) > 1 for x in seeds.values()) else ""
    return parts(
        f"{report['questions']} questions and {report['settings']['text_tokens']:,} tokens of held-out text "
        f"per cell, no dense last rows; {several}with their largest gap to the oracle as a fraction of "
        f"XAttention's; {machine(report)}:",
        table(
            "tokens: {n:,} | method: {name} | " + under(f"{a:.0%} of the blocks" for a in asked),
            lines,
        ),
        *notes,
    )
