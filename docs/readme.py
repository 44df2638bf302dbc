"""Fill the generated parts of README.md and docs/ from result files; ``--check`` only compares.

python docs/readme.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from seerattention.cli.info import markdown

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "benchmarks" / "results" / "cpu" / "demo.json"
BENCH = ROOT / "benchmarks" / "results" / "cpu" / "prefill.json"
GPU = ROOT / "benchmarks" / "results" / "h200"
ROOFLINE = ROOT / "docs" / "figures" / "prefill-h200.png"
CROSSOVER = ROOT / "src" / "seerattention" / "data" / "crossover.json"
TEACHER = ROOT / "src" / "seerattention" / "data" / "teacher" / "results.json"
CALIBRATE = ROOT / "benchmarks" / "results" / "cpu" / "calibrate.json"
DESIGNS = ROOT / "benchmarks" / "results" / "gates"
EVAL = ROOT / "benchmarks" / "results" / "h100" / "eval" / "summary.json"
BACKWARD = ROOT / "benchmarks" / "results" / "h200" / "block_sparse_backward.json"
SWEEP = ROOT / "benchmarks" / "results" / "h100" / "block_sparse_backward_sweep.json"
YARN = ROOT / "benchmarks" / "results" / "h200" / "yarn"
POLICY = "top_k:{density},sink_blocks=1"
GATES = ROOT / "src" / "seerattention" / "data" / "teacher-gates" / "results.json"


def machine(report: dict[str, Any]) -> str:
    """Say what a report was measured with."""
    v = report["versions"]
    return (
        f"{v['device']}, {v['threads']} threads, torch {v['torch']}, transformers {v['transformers']}, "
        f"Python {v['python']}"
    )


def quality(report: dict[str, Any]) -> str:
    """Return the demo's comparison as a table, dense first."""
    rows = report["rows"]
    lines = [
        f"At {rows[0]['tokens']:,} tokens; {report['questions']} needle questions; {machine(report)}:",
        "",
        "| method | density | perplexity | needles | needles, last rows dense | recall | prefill s | "
        "speedup |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['method']} | {r['density']:.1%} | {r['perplexity']:.2f} | {r['needle']:.0%} | "
        f"{r['needle_dense_last']:.0%} | {r['recall']:.1%} | {r['prefill_s']:.2f} | {r['speedup']:.2f}x |"
        for r in rows
    ]
    return "\n".join(lines)


def times(report: dict[str, Any]) -> str:
    """Return the time curve as a table."""
    lines = [
        "| tokens | model dense s | model sparse s | speedup | one layer's attention dense ms | sparse ms | "
        "choosing blocks ms | attention speedup | with choosing |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in report["lengths"]:
        total = r["sparse_attention_s"] + r["selection_s"]
        lines.append(
            f"| {r['tokens']:,} | {r['dense_prefill_s']:.2f} | {r['sparse_prefill_s']:.2f} | "
            f"{r['prefill_speedup']:.2f}x | {r['dense_attention_s'] * 1e3:.0f} | "
            f"{r['sparse_attention_s'] * 1e3:.0f} | {r['selection_s'] * 1e3:.0f} | "
            f"{r['attention_speedup']:.1f}x | {r['dense_attention_s'] / total:.1f}x |"
        )
    return "\n".join(lines)


def lengths() -> str:
    """Return the bundled gates' evaluation at several lengths, dense first."""
    rows = json.loads(GATES.read_text())
    lines = ["| tokens | method | density | perplexity | needles |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['tokens']:,} | {r['method']} | {r['density']:.1%} | {r['perplexity']:.2f} | "
        f"{r['needle']:.0%} of {r['questions']} |"
        for r in rows
    ]
    return "\n".join(lines)


def table_of_all() -> str:
    """Return every method at every density and length, dense first."""
    report = json.loads(EVAL.read_text())
    rows = {(r["task"], r["length"], r["method"], r["asked"]): r for r in report["rows"]}
    lengths = sorted({n for _, n, *_ in rows})
    (count,) = {r["samples"] for r in rows.values()}
    later = sorted({r["device"] for r in rows.values() if "device" in r})
    widest = {
        task: max(
            (r["interval"][1] - r["interval"][0]) / 2 / (r["score"] if task == "perplexity" else 1)
            for r in rows.values()
            if r["task"] == task
        )
        for task in ("perplexity", "needle")
    }
    dtype = report["dtype"].removeprefix("torch.")
    lines = [
        f"{report['date']}, {machine(report)}, {dtype}; `{POLICY}`, no dense last rows; {count} samples "
        f"a cell (of eight needles each). 95 % intervals are at most ± {widest['perplexity']:.1%} of a "
        f"perplexity, most of it the texts', the same for every method, and ± {widest['needle']:.0%} of "
        f"needles. {sum('device' in r for r in rows.values())} of {len(rows)} figures are from an "
        f"{', '.join(later)}, where all that was measured on both cards was the same:",
        "",
        "| method | blocks asked | "
        + " | ".join(f"{n // 1024}k: read, perplexity, needles" for n in lengths)
        + " |",
        "|---" * (2 + len(lengths)) + "|",
    ]
    for method, asked in dict.fromkeys((m, a) for _, _, m, a in rows):
        cells = []
        for n in lengths:
            loss, needle = (rows[task, n, method, asked] for task in ("perplexity", "needle"))
            cells.append(f"{loss['density']:.0%}, {loss['score']:.2f}, {needle['score']:.0%}")
        name = f"**{method}**" if method in ("dense", "gates") else method
        lines.append(f"| {name} | {'all' if asked is None else f'{asked:.0%}'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def backward() -> str:
    """Return forward and backward beside dense attention's, the parts alone, and the launches tried."""
    report = json.loads(BACKWARD.read_text())
    lines = [
        f"{report['date']}, {machine(report)}; {report['dtype']}, {report['heads'][0]} query and "
        f"{report['heads'][1]} KV heads of {report['head_dim']}, blocks of {report['block']}, "
        f"{report['density']:.0%} of the earlier blocks at random:",
        "",
        "| tokens | what | median ms | range ms | TFLOP/s | speedup | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in report["rows"]:
        speedup = "" if r["speedup"] is None else f"{r['speedup']:.2f}x"
        low, high = r["range_ms"]
        lines.append(
            f"| {r['tokens']:,} | {r['variant']} | {r['ms']:.3f} | {low:.3f}-{high:.3f} | "
            f"{r['tflops'] or ''} | {speedup} | {r['peak_mb'] or ''} |"
        )
    report = json.loads(SWEEP.read_text())
    lines += ["", f"{report['date']}, {machine(report)}:", "", "| part, 32k | launch | ms |", "|---|---|---|"]
    lines += [f"| {r['part']} | `{r['launch']}` | {r['ms']:.3f} |" for r in report["sweep"]]
    return "\n".join(lines)


def measured_with(report: dict[str, Any]) -> str:
    """Say what a prefill report was measured with, and the ceilings of that run."""
    shape, limits = report["shape"], report["ceilings"]
    size = limits["matmul_size"]
    text = (
        f"{report['date']}, {machine(report)}; {report['dtype']}, {shape['heads']} query and "
        f"{shape['kv_heads']} KV heads of {shape['head_dim']}, batch 1; a matrix product of {size} x "
        f"{size} x {size} ran at {digits(limits['matmul_tflops'])} TFLOP/s"
    )
    for name, what in (("copy_tbs", "copies"), ("l2_tbs", "reads from the L2 cache")):
        text += f", {what} at {digits(limits[name])} TB/s" if limits[name] else ""
    return text + ":"


def digits(value: float) -> str:
    """Return a number with about three digits."""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def bench() -> str:
    """Return the prefill benchmark on a CPU as a table, dense first at every length."""
    report = json.loads(BENCH.read_text())
    lines = [
        measured_with(report),
        "",
        "| tokens | block | mask | backend | density | median ms | range ms | TFLOP/s | of the matrix rate | "
        "speedup |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['tokens']:,} | {r['block'] or ''} | {r['mask']} | {r['backend']} | {r['density']:.1%} | "
        f"{r['ms']:.1f} | {r['range_ms'][0]:.1f}-{r['range_ms'][1]:.1f} | {r['tflops']:.3f} | "
        f"{r['share_of_matmul']:.0%} | {r['speedup']:.2f}x |"
        for r in report["rows"]
    ]
    lines += ["", *layers(report)] if report["layers"] else []
    lines += ["", *report["notes"]] if report["notes"] else []
    return "\n".join(lines)


def layers(report: dict[str, Any]) -> list[str]:
    """Return whole layers of a report as a table."""
    lines = [
        "| tokens | block | gate | density | selection ms | attention ms | together ms | dense ms | "
        "speedup | extra MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in report["layers"]:
        memory = "" if r["memory_mb"] is None else digits(r["memory_mb"])
        lines.append(
            f"| {r['tokens']:,} | {r['block']} | {r['gate']} | {r['density']:.1%} | "
            f"{digits(r['selection_ms'])} | {digits(r['attention_ms'])} | {digits(r['total_ms'])} | "
            f"{digits(r['dense_ms'])} | {r['speedup']:.2f}x | {memory} |"
        )
    return lines


def gpu() -> str:
    """Return what was measured on a GPU: picture, targets, attention, layers, whole model; or nothing."""
    parts = []
    if (path := GPU / "prefill.json").exists():
        report = json.loads(path.read_text())
        if ROOFLINE.exists():
            parts.append(f"![Rate against density under the device's ceilings](figures/{ROOFLINE.name})")
        parts += [measured_with(report), attention(report), "\n".join(layers(report)), targets(report)]
        parts += ["\n".join(f"- {note}" for note in report["notes"])] if report["notes"] else []
    if (path := GPU / "end_to_end.json").exists():
        parts.append(end_to_end(json.loads(path.read_text())))
    return "\n\n".join(parts)


def gpu_short() -> str:
    """Return a GPU's attention at 10 % and everything read, per length and block size; dense first."""
    report = json.loads((GPU / "prefill.json").read_text())
    rows = report["rows"]
    lines = [
        measured_with(report),
        "",
        "| tokens | block | blocks read | cuDNN dense ms | `hopper` ms | speedup | `triton` ms | speedup |",
        "|---|---|---|---|---|---|---|---|",
    ]
    dense = {r["tokens"]: r["ms"] for r in rows if r["backend"] == "dense cudnn"}
    for hopper in rows:
        shown = hopper["mask"], hopper["asked"]
        if hopper["backend"] != "hopper" or shown not in (("full", 1.0), ("random", 0.1), ("gate", 0.1)):
            continue
        same = ("tokens", "block", "mask", "asked")
        triton = next(r for r in rows if r["backend"] == "triton" and all(r[k] == hopper[k] for k in same))
        read = "all" if hopper["mask"] == "full" else f"{hopper['mask']}, {hopper['density']:.1%}"
        lines.append(
            f"| {hopper['tokens']:,} | {hopper['block']} | {read} | {digits(dense[hopper['tokens']])} | "
            f"{digits(hopper['ms'])} | {hopper['speedup']:.2f}x | {digits(triton['ms'])} | "
            f"{triton['speedup']:.2f}x |"
        )
    return "\n".join(lines)


def attention(report: dict[str, Any]) -> str:
    """Return attention alone, one line per backend, one column per density asked for."""
    asked = sorted({r["asked"] for r in report["rows"]}, reverse=True)
    lines = [
        f"| tokens | block | mask | backend | {' | '.join(f'{a:.0%}' for a in asked)} |",
        "|---" * (4 + len(asked)) + "|",
    ]
    found: dict[tuple[Any, ...], dict[float, str]] = {}
    for r in report["rows"]:
        key = f"{r['tokens']:,}", r["block"] or "", r["mask"], r["backend"]
        cell = f"{digits(r['ms'])} ms, {digits(r['tflops'])} TFLOP/s, {r['speedup']:.2f}x"
        found.setdefault(key, {})[r["asked"]] = cell
    for key, cells in found.items():
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(cells.get(a, '') for a in asked)} |")
    return "\n".join(lines)


def targets(report: dict[str, Any]) -> str:
    """Return the targets and what was reached."""
    words = {True: "yes", False: "**no**", None: "not measured"}
    lines = ["| target | wanted | reached | met |", "|---|---|---|---|"]
    for r in report["targets"]:
        reached = "" if r["reached"] is None else digits(r["reached"])
        sign = "at most" if r["at_most"] else "at least"
        lines.append(f"| {r['what']} | {sign} {r['bound']} | {reached} | {words[r['met']]} |")
    return "\n".join(lines)


def end_to_end(report: dict[str, Any]) -> str:
    """Return the time to the first token and its parts."""
    parts = list(report["rows"][0]["parts_s"])
    lines = [
        f"Time to the first token, {report['date']}, {machine(report)}; shape {report['shape']} with "
        f"{report['layers']} layers and random weights, {report['dtype']}, `{report['policy']}`:",
        "",
        f"| tokens | method | first token s | speedup | {' | '.join(f'{p} s' for p in parts)} | peak GB |",
        "|---" * (5 + len(parts)) + "|",
    ]
    lines += [
        f"| {r['tokens']:,} | {r['method']} | {r['first_token_s']:.2f} | {r['speedup']:.2f}x | "
        + "".join(f"{r['parts_s'][part]:.2f} | " for part in parts)
        + f"{r['peak_gb'] or ''} |"
        for r in report["rows"]
    ]
    return "\n".join(lines)


def crossover() -> str:
    """Return up to which density sparse prefill is faster, per device and length."""
    lines = []
    for entry in json.loads(CROSSOVER.read_text()):
        if entry["device"] is None:
            lines += [
                f"On a {entry['device_type']} device no table was measured yet: prefill is dense below "
                f"{entry['dense_below']:,} tokens, a cautious guess.",
                "",
            ]
            continue
        lines += [
            f"{entry['device']}, {entry['date']}, torch {entry['versions']['torch']}, {entry['dtype']}, "
            f"`{entry['backend']}`, {entry['gate']} gate, blocks of {entry['block']}: dense below "
            f"{entry['dense_below']:,} tokens.",
            "",
            "| tokens | fastest dense | dense ms | selection ms | sparse is faster up to density |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['tokens']:,} | {r['dense']} | {digits(r['dense_ms'])} | {digits(r['selection_ms'])} | "
            f"{r['densest']:.0%} |"
            for r in entry["rows"]
        ]
        lines.append("")
    return "\n".join(lines).strip()


def dense_below() -> str:
    """Return from which length prefill is sparse, per device."""
    entries = json.loads(CROSSOVER.read_text())
    below = ", ".join(
        f"{e['dense_below']:,} tokens on {e['device'] or 'a ' + e['device_type'] + ' device (a guess)'}"
        for e in entries
    )
    return (
        "- Shorter prompts than this are prefilled densely, since choosing costs more than it saves:\n"
        f"  {below}; `min_tokens=` changes it."
    )


def calibrated_targets() -> str:
    """Return what calibrated thresholds do at half, once and twice the length they were calibrated at."""
    report = json.loads(CALIBRATE.read_text())
    on = report["calibrated_on"]
    lines = [
        f"{on['windows']} windows of {on['tokens']:,} tokens to calibrate on, {report['held_out_tokens']:,} "
        f"others to measure on; {machine(report)}. A cell is density, recall and the rise of perplexity over "
        "dense:",
        "",
        "| target | " + " | ".join(f"{int(n):,} tokens" for n in report["dense"]) + " |",
        "|---" * (1 + len(report["dense"])) + "|",
    ]
    for target in report["targets"]:
        cells = [
            f"{r['density']:.1%}, {r['recall']:.1%}, "
            f"{r['perplexity'] / report['dense'][str(r['tokens'])] - 1:+.1%}"
            for r in target["rows"]
        ]
        lines.append(f"| {target['target']} {target['value']:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def calibrated_compared() -> str:
    """Return calibrated thresholds, one threshold and top-k at equal measured density."""
    report = json.loads(CALIBRATE.read_text())
    tokens = report["calibrated_on"]["tokens"]
    lines = [
        f"At {tokens:,} tokens, the density measured; dense has a perplexity of "
        f"{report['dense'][str(tokens)]:.2f}:",
        "",
        "| | density | recall | perplexity |",
        "|---|---|---|---|",
    ]
    for entry in sorted(report["compared"], key=lambda e: -e["density"]):
        mine, threshold, *top_k = entry["rows"]
        rows = [("calibrated", mine), ("one threshold", threshold)]
        rows += [("top-k", row) for row in top_k]
        if len(top_k) == 2:
            low, high = top_k
            part = (mine["density"] - low["density"]) / (high["density"] - low["density"])
            line = {k: low[k] + part * (high[k] - low[k]) for k in ("density", "recall", "perplexity")}
            rows.append(("top-k, the line between", line))
        for name, row in rows:
            lines.append(f"| {name} | {row['density']:.2%} | {row['recall']:.1%} | {row['perplexity']:.2f} |")
    exponents = ", ".join(
        f"{r['row_exponent']:g}: {r['perplexity']:.2f} at {r['density']:.1%}" for r in report["row_exponents"]
    )
    return "\n".join([*lines, "", f"With other exponents of `n` than 0, for a density of 10 %: {exponents}."])


def gap(rows: dict[tuple[str, int, float], dict[str, Any]], method: str, tokens: int, asked: float) -> float:
    """Return how far a method's perplexity is from the oracle's, as a share of XAttention's distance."""
    one, best, other = (rows[m, tokens, asked]["perplexity"] for m in (method, "oracle", "xattention"))
    return (one - best) / (other - best)


def gates(name: str) -> str:
    """Return what one run of benchmarks/gate_design.py trained, beside the scorers of that run."""
    report = json.loads((DESIGNS / f"{name}.json").read_text())
    settings, rows = report["settings"], report["rows"]
    steps = {g["group"]: g["rows"][-1]["step"] for g in report["training"]}
    by = {(r["method"], r["tokens"], r["asked"]): r for r in rows}
    asked, lengths = settings["densities"], settings["eval_lengths"]
    lines = [
        f"{settings['batch']:,} tokens per step; `top_k`, the first and the own block forced, no dense last "
        f"rows, {report['questions']} questions and {settings['text_tokens']:,} tokens of held-out text per "
        f"cell; {machine(report)}. A cell is the perplexity's gap to the oracle as a share of XAttention's "
        "gap, and the needles found:",
        "",
        "| method | needle documents | cost at 32k | steps | "
        + " | ".join(f"{n // 1024}k, {a:.0%}" for n in lengths for a in asked)
        + " |",
        "|---" * (4 + len(asked) * len(lengths)) + "|",
    ]
    trained = {v["name"]: v for v in report["variants"]}
    free = [m for m in dict.fromkeys(r["method"] for r in rows) if m not in trained and m != "dense"]
    order = {"oracle": 0, "oracle_mass": 1, "xattention": 2}
    for method in [*sorted(free, key=lambda m: order.get(m, 9)), *trained]:
        cells = [
            f"{gap(by, method, n, a):.2f}, {by[method, n, a]['needle']:.0%}" for n in lengths for a in asked
        ]
        what = " | | "
        if variant := trained.get(method):
            what = (
                f"{variant['shares']['needles']:.0%} | {variant['cost_32k']:.2%} | {steps[variant['group']]}"
            )
        lines.append(f"| {method} | {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gates_final(name: str) -> str:
    """Return the final gates of several seeds beside every scorer: perplexity, its gap, and needles."""
    report = json.loads((DESIGNS / f"{name}.json").read_text())
    settings = report["settings"]
    by = {(r["method"], r["tokens"], r["asked"]): r for r in report["rows"]}
    asked, lengths = settings["densities"], settings["eval_lengths"]
    seeds = [v["name"] for v in report["variants"]]
    free = [m for m in dict.fromkeys(m for m, *_ in by) if m not in seeds and m != "dense"]
    order = {"oracle": 0, "oracle_mass": 1, "xattention": 2, "quest": 3}

    def cell(methods: list[str], tokens: int, density: float) -> str:
        rows = [by[m, tokens, density] for m in methods]
        perplexity, needles = (
            f"{min(values):{form}} to {max(values):{form}}" if len(set(values)) > 1 else f"{values[0]:{form}}"
            for values, form in (
                ([r["perplexity"] for r in rows], ".2f"),
                ([r["needle"] for r in rows], ".1%"),
            )
        )
        shares = [gap(by, m, tokens, density) for m in methods]
        share = f" (gap {max(shares):.2f})" if len(methods) > 1 else ""
        return f"{perplexity}{share}, {needles}"

    lines = [
        f"{report['questions']} questions and {settings['text_tokens']:,} tokens of held-out text per cell, "
        f"no dense last rows; lowest to highest of the gates' {len(seeds)} seeds, with the largest gap to "
        f"the oracle as a share of XAttention's; {machine(report)}:",
        "",
        "| tokens | method | " + " | ".join(f"{a:.0%} of the blocks" for a in asked) + " |",
        "|---|---" + "|---" * len(asked) + "|",
    ]
    for n in lengths:
        row = by["dense", n, 1.0]
        lines.append(
            f"| {n:,} | dense, all blocks | {row['perplexity']:.2f}, {row['needle']:.1%} |"
            + " |" * (len(asked) - 1)
        )
        for label, methods in [
            *((m, [m]) for m in sorted(free, key=lambda m: order.get(m, 9))),
            (f"**gates, {len(seeds)} seeds**", seeds),
        ]:
            lines.append(f"| {n:,} | {label} | {' | '.join(cell(methods, n, a) for a in asked)} |")
    return "\n".join(lines)


def pooled() -> str:
    """Return attention with its map beside dense attention on a GPU."""
    report = json.loads((GPU / "pooled_attention.json").read_text())
    lines = [
        f"{report['date']}, {machine(report)}; {report['dtype']}, {report['heads'][0]} query and "
        f"{report['heads'][1]} KV heads of {report['head_dim']}:",
        "",
        "| tokens | what | ms | range | over dense | MB beyond the outputs |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['tokens']:,} | {r['variant']} | {digits(r['ms'])} | {digits(r['range_ms'][0])}-"
        f"{digits(r['range_ms'][1])} | {r['times_dense']:.2f}x | {r['extra_mb']:.0f} |"
        for r in report["rows"]
    ]
    return "\n".join(lines)


def distill_step() -> str:
    """Return the cost of a training step beside the dense forward pass."""
    report = json.loads((GPU / "distill_step.json").read_text())
    lines = [
        f"{report['date']}, {machine(report)}; shape {report['shape']} with {report['layers']} layers and "
        f"random weights, {report['dtype']}, one sequence per step:",
        "",
        "| tokens | dense forward s | step s | ratio | pooled attention s | gate s | optimizer s | rest s | "
        "forward peak GB | step peak GB | GPU hours for 0.5 B tokens |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in report["rows"]:
        parts = r["parts_s"]
        lines.append(
            f"| {r['tokens']:,} | {r['forward_s']:.2f} | {r['step_s']:.2f} | {r['ratio']:.2f} | "
            f"{parts['pooled attention']:.2f} | {parts['gate']:.2f} | {parts['optimizer']:.3f} | "
            f"{parts['rest']:.2f} | {r['forward_peak_gb']:.1f} | {r['step_peak_gb']:.1f} | "
            f"{r['gpu_hours_per_0.5b_tokens']:.1f} |"
        )
    return "\n".join(lines)


def yarn() -> str:
    """Return the context extension: dense, with gates afterwards, jointly with them."""
    sys.path.insert(0, str(ROOT / "experiments" / "yarn"))
    from table import learning_rates, table

    reports = [json.loads(path.read_text()) for path in YARN.glob("lr-*.json")]
    shown = json.loads((YARN / "lr-1e-3.json").read_text())
    return f"{table(shown)}\n\n{learning_rates(reports)}"


def filled(path: Path, parts: dict[str, str]) -> str:
    """Return a page with its generated parts made anew."""
    text = path.read_text()
    for name, body in parts.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(pattern, lambda m, b=body: f"{m[1]}{b}\n{m[2]}", text, flags=re.S)
        if found != 1:
            sys.exit(f"{path.name} must hold one part marked <!-- {name} -->, it holds {found}")
    return text


def main() -> None:
    """Write the pages, or compare them."""
    report = json.loads(DEMO.read_text())
    pages = {
        ROOT / "README.md": {
            "quality": quality(report),
            "times": times(report),
            "lengths": lengths(),
            "table": table_of_all(),
            "gpu-short": gpu_short(),
            "support": markdown(),
            "dense": dense_below(),
        },
        ROOT / "docs" / "kernels.md": {
            "bench": bench(),
            "gpu": gpu(),
            "crossover": crossover(),
            "pooled": pooled(),
            "distill-step": distill_step(),
            "backward": backward(),
        },
        ROOT / "docs" / "method.md": {
            "gates-path": gates("path"),
            "gates-objectives": gates("objectives"),
            "gates-narrow": gates("narrow"),
            "gates-final": gates_final("llama"),
            "gates-second": gates_final("qwen3"),
            "calibrated-targets": calibrated_targets(),
            "calibrated-compared": calibrated_compared(),
            "yarn": yarn(),
        },
    }
    for path, parts in pages.items():
        after = filled(path, parts)
        if "--check" not in sys.argv:
            path.write_text(after)
        elif after != path.read_text():
            sys.exit(f"{path.name} differs from the result files; run python docs/readme.py")


if __name__ == "__main__":
    main()
