"""Fill the generated parts of README.md and docs/ from result files; ``--check`` only compares.

python docs/readme.py
"""

from __future__ import annotations

import json
import re
import runpy
import string
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from seerattention.cli.info import markdown
from seerattention.hosts.transformers import families
from seerattention.measure.intervals import rise
from seerattention.policies import forms

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DATA = ROOT / "src" / "seerattention" / "data"
POLICY = "top_k:{density},sink_blocks=1"
#: Under tables of selections by count that were measured before blocks read anyway counted.
FORMER = "Measured at commit f9ee062 or before, where a row's own block came on top of the count."
FORMER_DENSITY = f"{FORMER[:-1]}; the densities shown are as measured."
#: The methods of the README's table, under the names they have there.
REAL = {
    "dense": "dense attention",
    "default": "**SeerAttention gates**",
    "xattention": "XAttention",
    "meanpool": "mean-pool (MoBA)",
    "flexprefill": "FlexPrefill",
    "minference": "MInference",
    "quest": "Quest",
    "streaming": "first and latest blocks (StreamingLLM)",
    "oracle_mass": "*oracle, by the true map*",
}
HEADLINE = {
    "dense": "dense attention",
    "gates": "**SeerAttention gates**",
    "quest": "Quest",
    "xattention": "XAttention",
    "meanpool": "mean-pool (MoBA)",
    "streaming": "first and latest blocks (StreamingLLM)",
}

Report = dict[str, Any]


def read(*path: str, base: Path = RESULTS) -> Any:
    """Read a result file."""
    return json.loads(base.joinpath(*path).read_text())


class Cells(string.Formatter):
    """Format strings that also know ``~``, three digits, and a leading ``?``, nothing for 0 and None."""

    def format_field(self, value: Any, spec: str) -> str:
        """Format one value."""
        if spec.startswith("?"):
            return self.format_field(value, spec[1:]) if value else ""
        return digits(value) if spec == "~" else format(value, spec)

    def of(self, text: str, row: Report) -> str:
        """Fill in a row's values by name, or by ``row`` where a name is no word."""
        return self.vformat(text, (), {**row, "row": row})


def digits(value: float) -> str:
    """Return a number with about three digits."""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def table(columns: str, rows: Iterable[Report]) -> str:
    """Return a Markdown table.

    Args:
        columns: Title and cell of every column, as in ``"tokens: {tokens:,} | gate: {gate}"``.
        rows: What cells take their values from.
    """
    titles, cells = zip(*(column.split(": ", 1) for column in columns.split(" | ")), strict=True)
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    return "\n".join(lines + [f"| {Cells().of(' | '.join(cells), row)} |" for row in rows])


def parts(*texts: str) -> str:
    """Return paragraphs and tables under one another, empty ones left out."""
    return "\n\n".join(filter(None, texts))


def machine(report: Report) -> str:
    """Say what a report was measured with."""
    versions = "{device}, {threads} threads, torch {torch}, transformers {transformers}, Python {python}"
    return Cells().of(versions, report["versions"])


def attention_of(report: Report) -> str:
    """Say when, with what and on which heads something was measured."""
    return f"{report['date']}, {machine(report)}; " + Cells().of(
        "{dtype}, {heads[0]} query and {heads[1]} KV heads of {head_dim}", report
    )


def model_of(report: Report) -> str:
    """Say when, with what and on which model something was measured."""
    return f"{report['date']}, {machine(report)}; " + Cells().of(
        "shape {shape} with {layers} layers and random weights, {dtype}", report
    )


def real() -> str:
    """Return the README's table of a real model: what reading less of a prompt costs, by method."""
    report = read("gates", "prefill.json")
    made = runpy.run_path(str(ROOT / "experiments" / "prefill_gates" / "table.py"))
    ways = made["ways_of"](report)
    tokens = report["settings"]["eval_lengths"][-1]
    (seeds,) = {len(rows) for name, rows in ways.items() if name == "default"}

    def cells(name: str) -> dict[str, str]:
        row = {"name": REAL[name]}
        for share in ("0.2", "0.1"):
            if name != "dense":
                more, half = made["risen"](ways, name, str(tokens), share)
                row[f"at {share}"] = f"{more:+.1%} ± {half:.1%}"
            else:
                row[f"at {share}"] = ""
            found = [one["found"]["niah_single"] for one in ways[name]]
            row[f"found {share}"] = (
                f"{sum((f.get(share) or f['1'])['share'] for f in found) / len(found):.0%}"
            )
        return row

    settings = report["settings"]
    said = (
        f"SmolLM2-135M-Instruct, {settings['windows']} x {tokens:,} tokens of held-out books, every way at "
        f"the same number of blocks, on an H200. *Found*: a number hidden in 4,096 tokens, "
        f"{settings['questions']} questions, the last rows as sparse as all. The gates were taught "
        f"{settings['steps']} steps; means of {seeds} seeds:"
    )
    return parts(
        textwrap.fill(said, 118),
        table(
            "method: {name} | perplexity, 20 % of the blocks: {row[at 0.2]} | 10 %: {row[at 0.1]} | "
            "found, 20 %: {row[found 0.2]} | 10 %: {row[found 0.1]}",
            (cells(name) for name in REAL),
        ),
    )


def headline() -> str:
    """Return the README's sentence and its table: methods at 10 % of 32k tokens, and what that saves."""
    by = {r["method"]: r for r in read("teacher-gates", "results.json", base=DATA) if r["tokens"] == 32768}
    cpu = read("cpu", "demo.json")["lengths"][-1]
    asked = {"backend": "hopper", "tokens": 32768, "block": 64, "mask": "gate", "asked": 0.1}
    (gpu,) = (r for r in read("h200", "prefill.json")["rows"] if asked.items() <= r.items())
    default = {"case": "default-32k", "part": "total top_k:0.1 hopper"}
    (selecting,) = (r for r in read("h200", "select_blocks.json")["rows"] if default.items() <= r.items())
    with_selecting = gpu["ms"] * gpu["speedup"] / (gpu["ms"] + selecting["ms"])
    found, dense = (f"{by[method]['needle'] * 100:.0f} %" for method in ("gates", "dense"))
    text = (
        f"Reading 10 % of the blocks of 32k tokens, the bundled model finds {found} of the numbers hidden in "
        f"a novel, where dense attention finds {dense}; prefill is "
        f"{cpu['prefill_speedup']:.1f} times as fast on two CPU cores, and one layer's attention "
        f"{gpu['speedup']:.1f} times as fast on an H200, or {with_selecting:.1f} times where selecting the "
        "blocks counts too."
    )
    return parts(
        textwrap.fill(text, 118),
        table(
            "32,768 tokens: {name} | blocks read: {density:.1%} | perplexity: {perplexity:.2f} | "
            "needles found: {needle:.0%}",
            ({"name": name} | by[method] for method, name in HEADLINE.items()),
        ),
    )


def supported() -> str:
    """Return the README's lines about models and policies."""
    policies = ", ".join(f"`{form}`" for form in forms())
    return f"- Models: {', '.join(families())}.\n- Policies: {policies}. One set of gates serves all of them."


def quality() -> str:
    """Return the demo's comparison, dense first."""
    report = read("cpu", "demo.json")
    tokens = report["rows"][0]["tokens"]
    return parts(
        f"At {tokens:,} tokens; {report['questions']} needle questions; {machine(report)}:",
        table(
            "method: {method} | density: {density:.1%} | perplexity: {perplexity:.2f} | "
            "needles: {needle:.0%} | needles, last rows dense: {needle_dense_last:.0%} | "
            "recall: {recall:.1%} | prefill s: {prefill_s:.2f} | speedup: {speedup:.2f}x",
            report["rows"],
        ),
    )


def times() -> str:
    """Return the demo's time curve."""
    rows = read("cpu", "demo.json")["lengths"]
    for r in rows:
        r["with"] = r["dense_attention_s"] / (r["sparse_attention_s"] + r["selection_s"])
        r |= {f"{k}_ms": r[f"{k}_s"] * 1e3 for k in ("dense_attention", "sparse_attention", "selection")}
    return table(
        "tokens: {tokens:,} | model dense s: {dense_prefill_s:.2f} | "
        "model sparse s: {sparse_prefill_s:.2f} | speedup: {prefill_speedup:.2f}x | "
        "one layer's attention dense ms: {dense_attention_ms:.0f} | sparse ms: {sparse_attention_ms:.0f} | "
        "selecting blocks ms: {selection_ms:.0f} | attention speedup: {attention_speedup:.1f}x | "
        "with selecting: {with:.1f}x",
        rows,
    )


def lengths() -> str:
    """Return the bundled gates' evaluation at several lengths, dense first."""
    columns = (
        "tokens: {tokens:,} | method: {method} | density: {density:.1%} | perplexity: {perplexity:.2f} | "
        "needles: {needle:.0%} of {questions}"
    )
    return table(columns, read("teacher-gates", "results.json", base=DATA))


def table_of_all() -> str:
    """Return every method at every density and length, dense first."""
    report = read("h100", "eval", "summary.json")
    rows = {(r["task"], r["length"], r["method"], r["asked"]): r for r in report["rows"]}
    lengths = sorted({n for _, n, *_ in rows})
    (count,) = {r["samples"] for r in rows.values()}
    others = [r["device"] for r in rows.values() if "device" in r]

    def widest(task: str, relative: bool) -> float:
        found = (r for r in rows.values() if r["task"] == task)
        return max((r["interval"][1] - r["interval"][0]) / 2 / (r["score"] if relative else 1) for r in found)

    def line(method: str, asked: float | None) -> Report:
        cells = {
            f"at{n}": Cells().of("{density:.0%}, {score:.2f}", rows["perplexity", n, method, asked])
            + f", {rows['needle', n, method, asked]['score']:.0%}"
            for n in lengths
        }
        name = f"**{method}**" if method in ("dense", "gates") else method
        return {"name": name, "asked": "all" if asked is None else f"{asked:.0%}", **cells}

    return parts(
        f"{report['date']}, {machine(report)}, {report['dtype'].removeprefix('torch.')}; `{POLICY}`, no "
        f"dense last rows; {count} samples a cell, of eight needles each. 95 % intervals are at most "
        f"± {widest('needle', False):.0%} of needles and ± {widest('perplexity', True):.1%} of a perplexity; "
        "the latter is mostly the spread of the texts, which is the same for every method. "
        f"{len(others)} of {len(rows)} figures are from an {', '.join(sorted(set(others)))}. What was "
        "measured on both cards was the same.",
        table(
            "method: {name} | blocks asked: {asked} | "
            + " | ".join(f"{n // 1024}k (read, perplexity, needles): {{at{n}}}" for n in lengths),
            (line(*key) for key in dict.fromkeys((m, a) for _, _, m, a in rows)),
        ),
        FORMER_DENSITY,
    )


def backward() -> str:
    """Return forward and backward beside dense attention's, and the parts alone."""
    report = read("h200", "block_sparse_backward.json")
    return parts(
        f"{attention_of(report)}, blocks of {report['block']}, {report['density']:.0%} of the earlier blocks "
        "at random:",
        table(
            "tokens: {tokens:,} | what: {variant} | median ms: {ms:.3f} | "
            "range ms: {range_ms[0]:.3f}-{range_ms[1]:.3f} | TFLOP/s: {tflops:?} | speedup: {times} | "
            "peak MB: {peak_mb:?}",
            (r | {"times": f"{r['speedup']:.2f}x" if r["speedup"] else ""} for r in report["rows"]),
        ),
    )


def backward_sweep() -> str:
    """Return the launches of the backward that were tried."""
    report = read("h100", "block_sparse_backward_sweep.json")
    launches = table("part, 32k: {part} | launch: `{launch}` | ms: {ms:.3f}", report["sweep"])
    return parts(f"{report['date']}, {machine(report)}:", launches)


def measured_with(report: Report) -> str:
    """Say what a prefill report was measured with, and the ceilings of that run."""
    heads, limits = report["shape"], report["ceilings"]
    n = limits["matmul_size"]
    text = attention_of(report | heads | {"heads": (heads["heads"], heads["kv_heads"])}) + (
        f", batch 1; a matrix product of {n} x {n} x {n} ran at {digits(limits['matmul_tflops'])} TFLOP/s"
    )
    for name, what in (("copy_tbs", "copies"), ("l2_tbs", "reads from the L2 cache")):
        text += f", {what} at {digits(limits[name])} TB/s" if limits[name] else ""
    return text + ":"


def native() -> str:
    """Return the benchmark of the compiled kernel, and a layer with selecting, in both dtypes."""
    return "\n\n".join(
        parts(bench(f"prefill_native_{dtype}.json"), layers(read("cpu", f"layer_native_{dtype}.json")))
        for dtype in ("bfloat16", "float32")
    )


def bench(name: str = "prefill.json") -> str:
    """Return a prefill benchmark on a CPU, dense first at every length."""
    report = read("cpu", name)
    columns = (
        "tokens: {tokens:,} | block: {block:?} | mask: {mask} | backend: {backend} | "
        "density: {density:.1%} | median ms: {ms:.1f} | range ms: {range_ms[0]:.1f}-{range_ms[1]:.1f} | "
        "TFLOP/s: {tflops:.3f} | of the matrix rate: {share_of_matmul:.0%} | speedup: {speedup:.2f}x"
    )
    whole = layers(report) if report["layers"] else ""
    return parts(measured_with(report), table(columns, report["rows"]), whole, "\n".join(report["notes"]))


def layers(report: Report) -> str:
    """Return whole layers of a report."""
    return table(
        "tokens: {tokens:,} | block: {block} | gate: {gate} | density: {density:.1%} | "
        "selection ms: {selection_ms:~} | attention ms: {attention_ms:~} | together ms: {total_ms:~} | "
        "dense ms: {dense_ms:~} | speedup: {speedup:.2f}x | extra MB: {memory_mb:?~}",
        report["layers"],
    )


def pages() -> str:
    """Return prefill over keys in pages beside keys that lie behind one another, on a GPU."""
    report = read("h200", "prefill_pages.json")
    columns = (
        "tokens: {tokens:,} | block: {block:?} | backend: {backend} | density: {density:.1%} | "
        "median ms: {ms:~} | range ms: {range_ms[0]:~}-{range_ms[1]:~} | speedup: {speedup:.2f}x"
    )
    return parts(measured_with(report), table(columns, report["rows"]))


def gpu() -> str:
    """Return what was measured on a GPU: picture, attention, layers, targets, whole model."""
    report = read("h200", "prefill.json")
    return parts(
        "![Rate against density under the device's ceilings](figures/prefill-h200.png)",
        measured_with(report),
        by_density(report),
        layers(report),
        FORMER_DENSITY,
        targets(report),
        "\n".join(f"- {note}" for note in report["notes"]),
        end_to_end(),
    )


def targets(report: Report) -> str:
    """Return what a report should reach and whether it does."""
    return table(
        "target: {what} | wanted: {sign} {bound} | reached: {reached:?~} | met: {word}",
        (
            r
            | {"sign": "at most" if r["at_most"] else "at least"}
            | {"word": {True: "yes", False: "**no**", None: "not measured"}[r["met"]]}
            for r in report["targets"]
        ),
    )


def by_density(report: Report) -> str:
    """Return attention alone, one line per backend, one column per density asked for."""
    asked = sorted({r["asked"] for r in report["rows"]}, reverse=True)
    lines: dict[tuple[Any, ...], Report] = {}
    for r in report["rows"]:
        key = r["tokens"], r["block"], r["mask"], r["backend"]
        line = lines.setdefault(key, r | {f"at{i}": "" for i in range(len(asked))})
        cell = Cells().of("{ms:~} ms, {tflops:~} TFLOP/s, {speedup:.2f}x", r)
        line[f"at{asked.index(r['asked'])}"] = cell
    return table(
        "tokens: {tokens:,} | block: {block:?} | mask: {mask} | backend: {backend} | "
        + " | ".join(f"{a:.0%}: {{at{i}}}" for i, a in enumerate(asked)),
        lines.values(),
    )


def end_to_end() -> str:
    """Return the time to the first token and its parts."""
    report = read("h200", "end_to_end.json")
    return parts(
        f"Time to the first token, {model_of(report)}, `{report['policy']}`:",
        table(
            "tokens: {tokens:,} | method: {method} | first token s: {first_token_s:.2f} | "
            "speedup: {speedup:.2f}x | "
            + "".join(f"{p} s: {{parts_s[{p}]:.2f}} | " for p in report["rows"][0]["parts_s"])
            + "peak GB: {peak_gb:?}",
            report["rows"],
        ),
    )


def gpu_short() -> str:
    """Return a GPU's attention at 10 % and everything read, per length and block size; dense first."""
    report = read("h200", "prefill.json")
    by = {(r["backend"], r["tokens"], r["block"], r["mask"], r["asked"]): r for r in report["rows"]}
    dense = {r["tokens"]: r for r in report["rows"] if r["backend"] == "dense cudnn"}
    return parts(
        measured_with(report),
        table(
            "tokens: {tokens:,} | block: {block} | blocks read: {what} | cuDNN dense ms: {dense[ms]:~} | "
            "`hopper` ms: {ms:~} | speedup: {speedup:.2f}x | `triton` ms: {triton[ms]:~} | "
            "speedup: {triton[speedup]:.2f}x",
            (
                r
                | {"what": "all" if r["mask"] == "full" else Cells().of("{mask}, {density:.1%}", r)}
                | {"dense": dense[r["tokens"]], "triton": by["triton", *key]}
                for (backend, *key), r in by.items()
                if backend == "hopper" and tuple(key[2:]) in (("full", 1.0), ("random", 0.1), ("gate", 0.1))
            ),
        ),
    )


def crossover() -> str:
    """Return up to which density sparse prefill is faster, per device and length."""
    texts = []
    for entry in read("crossover.json", base=DATA):
        if entry["device"] is None:
            guess = (
                "On a {device_type} device no table was measured yet: prefill is dense below "
                "{dense_below:,} tokens, a cautious guess."
            )
            texts.append(Cells().of(guess, entry))
            continue
        measured = (
            "{device}, {date}, torch {versions[torch]}, {dtype}, `{backend}`, {gate} gate, "
            "blocks of {block}: dense below {dense_below:,} tokens."
        )
        columns = (
            "tokens: {tokens:,} | fastest dense: {dense} | dense ms: {dense_ms:~} | "
            "selection ms: {selection_ms:~} | sparse is faster up to density: {densest:.0%}"
        )
        texts += [Cells().of(measured, entry), table(columns, entry["rows"])]
        if "decode_rows" in entry:
            below = (
                "Steps of decoding one sequence, {decode_gate} gate: dense below {decode_dense_below:,} "
                "cached tokens."
            )
            steps = (
                "cached tokens: {tokens:,} | fastest dense: {dense} | dense us: {dense_us:~} | "
                "sparse us, choosing and summaries included: {step_us:~}"
            )
            rows = [
                r | {f"{k}_us": r[f"{k}_ms"] * 1e3 for k in ("dense", "step")} for r in entry["decode_rows"]
            ]
            texts += [Cells().of(below, entry), table(steps, rows)]
    return parts(*texts)


def dense_below() -> str:
    """Return from which length prefill is sparse, per device."""
    below = ", ".join(
        f"{e['dense_below']:,} tokens on {e['device'] or 'a ' + e['device_type'] + ' device (a guess)'}"
        for e in read("crossover.json", base=DATA)
    )
    return (
        "- Shorter prompts than this are prefilled densely, since selecting costs more than it saves:\n"
        f"  {below}; `min_tokens=` changes it."
    )


def calibrated_targets() -> str:
    """Return what calibrated thresholds do at half, once and twice the length they were calibrated at."""
    report = read("cpu", "calibrate.json")
    on, dense = report["calibrated_on"], report["dense"]
    for r in (r for target in report["targets"] for r in target["rows"]):
        rise = r["perplexity"] / dense[str(r["tokens"])] - 1
        r["cell"] = f"{r['density']:.1%}, {r['recall']:.1%}, {rise:+.1%}"
    return parts(
        f"{on['windows']} windows of {on['tokens']:,} tokens to calibrate on, {report['held_out_tokens']:,} "
        f"others to measure on; {machine(report)}. A cell is density, recall and the rise of perplexity over "
        "dense:",
        table(
            "target: {target} {value:.0%} | "
            + " | ".join(f"{int(n):,} tokens: {{rows[{i}][cell]}}" for i, n in enumerate(dense)),
            report["targets"],
        ),
    )


def calibrated_compared() -> str:
    """Return calibrated thresholds, one threshold and top-k at equal measured density."""
    report = read("cpu", "calibrate.json")
    tokens = report["calibrated_on"]["tokens"]
    rows = []
    for entry in sorted(report["compared"], key=lambda e: -e["density"]):
        names = ("calibrated", "one threshold", "top-k", "top-k")
        rows += [{"name": name} | row for name, row in zip(names, entry["rows"], strict=False)]
        mine, _, *top_k = entry["rows"]
        if len(top_k) == 2:
            low, high = top_k
            part = (mine["density"] - low["density"]) / (high["density"] - low["density"])
            line = {k: low[k] + part * (high[k] - low[k]) for k in ("density", "recall", "perplexity")}
            rows.append({"name": "top-k, the line between"} | line)
    exponents = (
        f"{r['row_exponent']:g}: {r['perplexity']:.2f} at {r['density']:.1%}" for r in report["row_exponents"]
    )
    return parts(
        f"At {tokens:,} tokens, the density measured; dense has a perplexity of "
        f"{report['dense'][str(tokens)]:.2f}:",
        table(
            "policy: {name} | density: {density:.2%} | recall: {recall:.1%} | perplexity: {perplexity:.2f}",
            rows,
        ),
        FORMER_DENSITY,
        f"With other exponents of `n`, for a density of 10 %: {', '.join(exponents)}.",
    )


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


def decode() -> str:
    """Return a step of decoding beside dense decoding and peers, a column per size."""
    report = read("h200", "decode.json")
    sizes = list(dict.fromkeys((r["batch"], r["tokens"]) for r in report["rows"]))
    lines: dict[str, Report] = {}
    for r in report["rows"]:
        line = lines.setdefault(r["variant"], r | {f"at{i}": "" for i in range(len(sizes))})
        cell = "{us:~} us, {tb_s:.2f} TB/s, {speedup:.2f}x" if r["tb_s"] else "{us:~} us"
        line[f"at{sizes.index((r['batch'], r['tokens']))}"] = Cells().of(cell, r | {"us": r["ms"] * 1e3})
    shape, copy = report["shape"], digits(report["ceilings"]["copy_tbs"])
    return parts(
        f"{attention_of(report | shape | {'heads': (shape['heads'], shape['kv_heads'])})}, blocks of "
        f"{report['block']}, {report['density']:.0%} of them read; copies ran at {copy} TB/s:",
        table(
            "variant: {variant} | "
            + " | ".join(f"{b} x {n // 1024}k: {{at{i}}}" for i, (b, n) in enumerate(sizes)),
            lines.values(),
        ),
        targets(report),
        "\n".join(f"- {note}" for note in report["notes"]),
    )


def decode_step() -> str:
    """Return a whole model's step, dense and sparse."""
    report = read("h200", "decode_step.json")
    return parts(
        f"A whole step, {model_of(report)}, {report['density']:.0%} of the cache read:",
        table(
            "batch: {batch} | cached tokens: {tokens:,} | method: {method} | how: {how} | ms: {ms:.2f} | "
            "range ms: {range_ms[0]:.2f}-{range_ms[1]:.2f} | tokens/s: {tokens_per_s:,.0f} | "
            "speedup: {speedup:.2f}x",
            report["rows"],
        ),
    )


def decoding() -> str:
    """Return the README's table of decoding: a layer's attention at every size, and a whole model."""
    report = read("h200", "decode.json")
    by = {(r["batch"], r["tokens"], r["variant"]): r for r in report["rows"]}
    rows = []
    for r in (r for r in report["rows"] if r["variant"] == "triton"):
        at = r["batch"], r["tokens"]
        dense = min(
            d["ms"] for d in report["rows"] if d["kind"] == "dense" and (d["batch"], d["tokens"]) == at
        )
        peer = by.get((*at, "flashinfer"))
        rows.append(
            {
                "what": f"a layer's attention, {at[0]} x {at[1] // 1024}k",
                "dense": f"{dense * 1e3:,.0f} us",
                "peer": f"{peer['speedup']:.1f}x" if peer else "",
                "alone": f"{r['speedup']:.1f}x",
                "keys": f"**{by[*at, 'with choosing, default']['speedup']:.1f}x**",
                "blocks": f"{by[*at, 'with choosing, sub64']['speedup']:.1f}x",
            }
        )
    model = read("h200", "decode_step.json")["rows"]
    for r in (r for r in model if r["method"] == "sparse" and r["tokens"] == 131072):
        what = f"the whole step of an 8B model, {r['batch']} x {r['tokens'] // 1024}k"
        dense = f"{r['ms'] * r['speedup']:.1f} ms"
        rows.append(
            {"what": what, "dense": dense, "keys": f"**{r['speedup']:.1f}x**"}
            | dict.fromkeys(("peer", "alone", "blocks"), "")
        )
    return table(
        "one H200, decoding, a tenth read, sequences x cached tokens: {what} | best dense kernel: {dense} | "
        "FlashInfer, the same blocks: {peer} | "
        "this kernel: {alone} | choosing too, by gates with 16 numbers per key: {keys} | "
        "with 96 per block: {blocks}",
        rows,
    )


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
            + " | ".join(f"{n // 1024}k, {a:.0%}: {{at[{i}]}}" for i, (n, a) in enumerate(shown)),
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
            "tokens: {n:,} | method: {name} | "
            + " | ".join(f"{a:.0%} of the blocks: {{at[{i}]}}" for i, a in enumerate(asked)),
            lines,
        ),
        *notes,
    )


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
            + " | ".join(f"rise of perplexity at {n:,} tokens: {{risen[{i}]}}" for i, n in enumerate(budgets))
            + f" | one number in the text, found at {budgets[0]}: {{found[0]:.0%}} "
            + "| one of four: {found[1]:.0%} "
            + f"| attention kept at {budgets[0]}: {{kept}}",
            rows,
        ),
    )


def prefill_gates() -> str:
    """Return what gates and other scorers lose and find in prefill."""
    report = read("gates", "prefill.json")
    settings = report["settings"]
    made = runpy.run_path(str(ROOT / "experiments" / "prefill_gates" / "table.py"))
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
    made = runpy.run_path(str(ROOT / "experiments" / "prefill_gates" / "table.py"))
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


def approximate() -> str:
    """Return what choosing by cheaper approximations chooses otherwise, and loses."""
    report = read("gates", "approximate.json")
    made = runpy.run_path(str(ROOT / "experiments" / "approximate" / "table.py"))
    windows = ", ".join(f"{x['settings']['windows']} of {x['settings']['model']}" for x in report["ranking"])
    asked = "; ".join(
        f"{x['settings']['model']}, {x['settings']['windows']} windows"
        + (f", {8 * x['settings']['documents']} numbers" if x["settings"]["documents"] else "")
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


def pooled() -> str:
    """Return attention with its map beside dense attention on a GPU."""
    report = read("h200", "pooled_attention.json")
    columns = (
        "tokens: {tokens:,} | what: {variant} | ms: {ms:~} | range: {range_ms[0]:~}-{range_ms[1]:~} | "
        "over dense: {times_dense:.2f}x | MB beyond the outputs: {extra_mb:.0f}"
    )
    return parts(f"{attention_of(report)}:", table(columns, report["rows"]))


def distill_step() -> str:
    """Return the cost of a training step beside the dense forward pass."""
    report = read("h200", "distill_step.json")
    columns = (
        "tokens: {tokens:,} | dense forward s: {forward_s:.2f} | step s: {step_s:.2f} | ratio: {ratio:.2f} | "
        "pooled attention s: {parts_s[pooled attention]:.2f} | gate s: {parts_s[gate]:.2f} | "
        "optimizer s: {parts_s[optimizer]:.3f} | rest s: {parts_s[rest]:.2f} | "
        "forward peak GB: {forward_peak_gb:.1f} | step peak GB: {step_peak_gb:.1f} | "
        "GPU hours for 0.5 B tokens: {row[gpu_hours_per_0.5b_tokens]:.1f}"
    )
    return parts(f"{model_of(report)}, one sequence per step:", table(columns, report["rows"]))


def first_token() -> str:
    """Return how long vLLM takes to the first token of a prompt, summaries made anew or kept."""
    report = read("cpu", "first_token.json")
    seconds = {(row["piece"], row["length"], row["way"]): row["seconds"] for row in report["rows"]}
    rows = []
    for piece, length in dict.fromkeys((row["piece"], row["length"]) for row in report["rows"]):
        dense, made, kept = (seconds[piece, length, way] for way in ("dense", "made", "kept"))
        rows.append({"piece": piece, "length": length, "dense": dense, "made": made, "kept": kept})
        rows[-1] |= {"made_x": dense / made, "kept_x": dense / kept}
    columns = (
        "tokens: {length:,} | in pieces of: {piece:,} | dense s: {dense:.2f} | "
        "summaries made s: {made:.2f} | kept s: {kept:.2f} | made, over dense: {made_x:.2f}x | "
        "kept: {kept_x:.2f}x"
    )
    on = report["versions"]
    about = (
        f"Seconds to the first token, the bundled model in {report['dtype']}, `{report['policy']}`, medians "
        f"of three prompts without shared pages; vLLM {on['vllm']}, torch {on['torch']}, {on['threads']} "
        f"threads, {on['device']}, with the CPU's kernel compiled (`seerattention build`):"
    )
    return parts(about, table(columns, rows))


def first_token_gpu() -> str:
    """Return how long vLLM takes on a GPU to a first token, and to answer requests together."""
    report = read("h200", "first_token.json")
    on, dense, lines = report["versions"], {}, []
    for row in report["rows"]:
        asked = row["length"], row["piece"], row.get("requests", 1)
        if row["way"] == "dense":
            dense[asked] = row.get("together") or row["seconds"]
            continue
        took = row.get("together") or row["seconds"]
        what = f"{asked[2]} requests, {row['answer']} tokens each" if "together" in row else "first token"
        what += ", `aligned`" if row.get("aligned") else ""
        lines.append({"what": what, "length": asked[0], "piece": asked[1], "dense": dense[asked]})
        lines[-1] |= {"sparse": took, "x": dense[asked] / took}
    return parts(
        f"A model of the shape of Llama 3.1 8B with random weights in {report['dtype']}, the default gate, "
        f"`{report['policy']}`, summaries made anew; eager but for replayed steps, dense and sparse alike; "
        f"vLLM {on['vllm']} with FlashAttention 3, torch {on['torch']}, {on['device']}:",
        table(
            "tokens: {length:,} | in pieces of: {piece:,} | until: {what} | dense s: {dense:.2f} | "
            "sparse s: {sparse:.2f} | over dense: {x:.2f}x",
            lines,
        ),
    )


def parallel() -> str:
    """Return how long processes take that share a prompt, and what a step of distillation takes there."""
    report, longer = read("h200", "parallel.json"), read("h200", "parallel_512k.json")
    about = (
        f"{report['date']}, {machine(report)}, one process per GPU, NCCL over NVLink; shape "
        f"{report['model']} with random weights, {report['dtype']}, `{report['policy']}`, the default gate. "
        "A layer by wall time, launches included, and its parts alone; dense by cuDNN on one "
        "GPU, by torch's ring on two:"
    )
    columns = (
        "tokens: {tokens:,} | GPUs: {processes} | layer ms: {ms:.1f} | over one: {over} | choosing ms: "
        "{choosing_ms:.1f} | exchange ms: {exchange_ms:.2f} | attention ms: {attention_ms:.1f} | dense ms: "
        "{dense_ms:.1f}"
    )
    alone = {row["tokens"]: row["ms"] for row in report["layers"] if row["processes"] == 1}
    layers = [
        row | {"over": f"{alone[row['tokens']] / row['ms']:.2f}x" if row["tokens"] in alone else ""}
        for row in (*report["layers"], *longer["layers"])
    ]
    shared = read("h200", "distill_step_shared.json")
    steps = (
        "tokens: {tokens:,} | GPUs: {processes} | forward s: {forward_s:.2f} | step s: {step_s:.2f} | "
        "ratio: {ratio:.2f} | forward peak GB: {forward_peak_gb:.1f} | step peak GB: {step_peak_gb:.1f}"
    )
    return parts(
        about,
        table(columns, layers),
        f"The first token, with embedding and head ({report['model_layers']} layers; "
        f"{longer['model_layers']} at 524,288 tokens). GPUs share the prompt, dense by torch's "
        "own context parallelism, or the heads:",
        _first_tokens([*report["first_tokens"], *longer["first_tokens"]]),
        f"A step of distillation of {shared['layers']} layers on a sequence that GPUs share, beside its "
        "forward pass:",
        table(steps, shared["rows"]),
    )


def _first_tokens(measured: list[Report]) -> str:
    """Return first tokens: by gates beside dense, on one GPU and on several."""
    rows: dict[Any, Report] = {}
    for row in measured:
        rows.setdefault((row["tokens"], row["processes"], row["shared"]), {})[row["way"]] = row
    shown = []
    for (tokens, _, shared), ways in rows.items():
        gates, dense = ways["gates"], ways["dense"]
        alone = rows.get((tokens, 1, ""))
        shown.append(
            gates
            | {"shared": {"context": "the prompt", "tensor": "the heads", "": ""}[shared]}
            | {"over": f"{alone['gates']['seconds'] / gates['seconds']:.2f}x" if alone else ""}
            | {"dense": dense["seconds"], "gain": dense["seconds"] / gates["seconds"]}
        )
    return table(
        "tokens: {tokens:,} | GPUs: {processes} | they share: {shared} | gates s: {seconds:.3f} | "
        "over one GPU: {over} | dense s: {dense:.3f} | gates over dense: {gain:.2f}x | "
        "peak GB: {peak_gb:.1f}",
        shown,
    )


def yarn() -> str:
    """Return the context extension: dense, with gates afterwards, jointly with them."""
    made = runpy.run_path(str(ROOT / "experiments" / "yarn" / "table.py"))
    folder = RESULTS / "h200" / "yarn"
    reports = [json.loads(path.read_text()) for path in folder.glob("lr-*.json")]
    shown = made["table"](read("lr-1e-3.json", base=folder))
    return parts(shown, made["learning_rates"](reports), FORMER)


def decode_quality() -> str:
    """Return what decoding loses by reading less."""
    made = runpy.run_path(str(ROOT / "experiments" / "decoding" / "table.py"))
    reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*/decode_quality*.json"))]
    return made["tables"](reports)


#: The generated parts of every page.
PAGES = {
    "README.md": {"real": real, "headline": headline, "decoding": decoding, "supported": supported},
    "docs/results.md": {
        "quality": quality, "times": times, "lengths": lengths, "table": table_of_all, "gpu-short": gpu_short,
        "decode-quality": decode_quality,
    },
    "docs/serving.md": {"first-token": first_token, "first-token-gpu": first_token_gpu},
    "docs/support.md": {"support": markdown, "dense": dense_below},
    "docs/kernels.md": {
        "bench": bench, "native": native, "gpu": gpu, "pages": pages, "crossover": crossover,
        "pooled": pooled, "approximate": approximate,
        "distill-step": distill_step, "parallel": parallel, "backward": backward, "decode": decode,
        "decode-step": decode_step,
    },
    "docs/lab/kernels.md": {"backward-sweep": backward_sweep},
    "docs/method.md": {
        "gates-path": lambda: gates("path"), "gates-objectives": lambda: gates("objectives"),
        "gates-narrow": lambda: gates("narrow"), "gates-final": lambda: gates_final("llama"),
        "gates-second": lambda: gates_final("qwen3", FORMER), "calibrated-targets": calibrated_targets,
        "decode-gates": decode_gates, "prefill-gates": prefill_gates, "longer": longer,
        "calibrated-compared": calibrated_compared, "yarn": yarn,
    },
}  # fmt: skip


def main() -> None:
    """Write the pages, or compare them."""
    # Tables are of a machine on which nothing was compiled, wherever they are made.
    torch.hub.set_dir(ROOT / "nothing" / "hub")
    for name, bodies in PAGES.items():
        page = ROOT / name
        before = text = page.read_text()
        for part, body in bodies.items():
            made, pattern = body(), rf"(<!-- {part} -->\n).*?(<!-- end -->)"
            text, found = re.subn(pattern, lambda m, made=made: f"{m[1]}{made}\n{m[2]}", text, flags=re.S)
            if found != 1:
                sys.exit(f"{name} must hold one part marked <!-- {part} -->, it holds {found}")
        if "--check" not in sys.argv:
            page.write_text(text)
        elif text != before:
            sys.exit(f"{name} differs from the result files; run python docs/readme.py")


if __name__ == "__main__":
    main()
