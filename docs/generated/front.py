"""The README: what reading less costs, saves and supports."""

from __future__ import annotations

import textwrap

from generated.reports import DATA, experiment, read
from generated.text import parts, table
from seerattention.hosts.transformers import families
from seerattention.policies import forms

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


def real() -> str:
    """Return the README's table of a real model: what reading less of a prompt costs, by method."""
    report = read("gates", "prefill.json")
    made = experiment("prefill_gates")
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


def supported() -> str:
    """Return the README's lines about models and policies."""
    policies = ", ".join(f"`{form}`" for form in forms())
    return f"- Models: {', '.join(families())}.\n- Policies: {policies}. One set of gates serves all of them."
