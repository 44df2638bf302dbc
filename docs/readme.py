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
TEACHER = ROOT / "src" / "seerattention" / "data" / "teacher" / "results.json"
DESIGNS = ROOT / "benchmarks" / "results" / "cpu" / "gate_design.json"
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


def bench() -> str:
    """Return the prefill benchmark as a table, dense first at every length."""
    report = json.loads(BENCH.read_text())
    shape = report["shape"]
    lines = [
        f"{report['date']}, {machine(report)}; {report['dtype']}, {shape['heads']} query and "
        f"{shape['kv_heads']} KV heads of {shape['head_dim']}, blocks of {shape['block']}, random blocks per "
        f"head; a matrix product of 2048 x 2048 x 2048 ran at {report['matmul_tflops']:.3f} TFLOP/s:",
        "",
        "| tokens | backend | density | median ms | range ms | TFLOP/s | of the matrix rate | speedup |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['tokens']:,} | {r['backend']} | {r['density']:.1%} | {r['ms']:.1f} | "
        f"{r['range_ms'][0]:.1f}-{r['range_ms'][1]:.1f} | {r['tflops']:.3f} | {r['share_of_matmul']:.0%} | "
        f"{r['speedup']:.2f}x |"
        for r in report["rows"]
    ]
    return "\n".join(lines)


def designs() -> str:
    """Return the comparison of gate designs as a table."""
    report = json.loads(DESIGNS.read_text())
    lines = [
        f"{report['steps']} steps of {report['length']:,} tokens for every design, then `{report['policy']}` "
        f"at {report['tokens']:,} tokens, no dense last rows, {report['questions']} questions; "
        f"{machine(report)}:",
        "",
        "| design | parameters | loss | density | perplexity | needles |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['design']} | {r['parameters']:,} | {r['loss']:.3f} | {r['density']:.1%} | "
        f"{r['perplexity']:.2f} | {r['needle']:.0%} |"
        for r in report["rows"]
    ]
    return "\n".join(lines)


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
            "support": markdown(),
        },
        ROOT / "docs" / "kernels.md": {"bench": bench()},
        ROOT / "docs" / "method.md": {"designs": designs()},
    }
    for path, parts in pages.items():
        after = filled(path, parts)
        if "--check" not in sys.argv:
            path.write_text(after)
        elif after != path.read_text():
            sys.exit(f"{path.name} differs from the result files; run python docs/readme.py")


if __name__ == "__main__":
    main()
