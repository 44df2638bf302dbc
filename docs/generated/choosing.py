"""docs/method.md and docs/kernels.md: what gates and other scorers lose and find."""

from __future__ import annotations

from typing import Any

from generated.reports import POLICY, experiment, machine, read
from generated.text import parts, table, under
from seerattention.measure.intervals import rise


def prefill_gates() -> str:
    """Return what gates and other scorers lose and find in prefill."""
    report = read("gates", "prefill.json")
    settings = report["settings"]
    made = experiment("prefill_gates")
    return parts(
        f"{settings['model']}, {settings['steps']} steps of {settings['length']:,} tokens of books; "
        f"`{POLICY}`, no dense last rows; {settings['windows']} windows of held-out books, and "
        f"{settings['questions']} questions of each task at {settings['eval_lengths'][0]:,} tokens; "
        f"{machine(report)}. A cell is the rise of perplexity over dense attention with its 95 % interval, "
        "and that as a share of XAttention's; below, the answers whose every digit is foreseen, and the "
        "digits' mean log-likelihood. Of several seeds it is the mean, lowest and highest in brackets:",
        made["table"](report),
    )


def longer() -> str:
    """Return what gates lose and find at lengths that they were not taught at."""
    report = read("gates", "lengths.json")
    made = experiment("prefill_gates")
    found = []
    for model in report["models"]:
        s = model["settings"]
        asked = f"{s['questions']} questions of each task at {s['eval_lengths'][0]:,} tokens"
        if s["documents"]:
            asked = f"{8 * s['documents']} questions at each length, the last number of a cell"
        told = f"{s['model']}, {s['windows']} windows of held-out books and {asked}:"
        found += [told, made["table"](model)]
    said = f"`{POLICY}`, no dense last rows; gates after 200 steps; {machine(report)}. Cells as above."
    return parts(said, *found)


def decode_gates() -> str:
    """Return what gates and other scorers lose and find where single tokens choose."""
    report = read("gates", "decode.json")
    settings, by_name = report["settings"], {row["name"]: row for row in report["rows"]}
    (dense,) = by_name["dense"]["losses"].values()
    budgets = sorted(map(int, by_name["default"]["losses"]))

    def risen(row: dict[str, Any], budget: int) -> str:
        if (losses := row["losses"].get(str(budget))) is None:
            return ""
        more, half = rise(losses, dense)
        return f"{more:+.1%} ± {half:.1%}"

    rows = [
        {
            "name": row["name"],
            "read": f"{row['read']:.1%}" if "read" in row else "",
            "risen": [risen(row, budget) for budget in budgets],
            "found": list(row["found"].values()),
            "kept": f"{row['recall'][str(budgets[0])]:.1%}" if "recall" in row else "",
        }
        for row in by_name.values()
    ]
    return parts(
        f"{settings['model']}, {settings['steps']} steps of {settings['length']:,} tokens of books, "
        f"{settings['windows']} windows of as many tokens of held-out ones, whose second halves are decoded, "
        f"and {settings['questions']} questions of each task behind {settings['length'] // 2:,} tokens; "
        f"{machine(report)}:",
        table(
            "chosen by: {name} | keys' summaries, share of K: {read} | "
            + under((f"rise of perplexity at {n:,} tokens" for n in budgets), "risen")
            + f" | one number in the text, found at {budgets[0]}: {{found[0]:.0%}} "
            + "| one of four: {found[1]:.0%} "
            + f"| attention kept at {budgets[0]}: {{kept}}",
            rows,
        ),
    )


def approximate() -> str:
    """Return what choosing by cheaper approximations chooses otherwise, and loses."""
    report = read("gates", "approximate.json")
    made = experiment("approximate")
    windows = ", ".join(f"{x['settings']['windows']} of {x['settings']['model']}" for x in report["ranking"])
    asked = "; ".join(
        f"{x['settings']['model']}, {x['settings']['windows']} windows"
        + (f", {8 * x['settings']['documents']} numbers" if x["settings"]["documents"] else "")
        + (f", {x['settings']['questions']} questions" if x["settings"]["questions"] else "")
        for x in report["quality"]
    )
    return parts(
        f"`{POLICY}`, no dense last rows; windows of held-out books, {windows}; {machine(report)}, fp32. A "
        "cell is the share of the exact way's blocks that are chosen too, of those that are a choice; the "
        "attention in all blocks read, relative to the exact way's; and that without the blocks read anyway:",
        made["table"](report["ranking"]),
        "The rise of perplexity over dense attention, the rise over the exact way with its 95 % interval, "
        f"and the numbers found ({asked}):",
        made["table"](report["quality"]),
    )
