"""docs/serving.md: the time to a first token in vLLM."""

from __future__ import annotations

from generated.reports import read
from generated.text import parts, table


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
