"""Compare gate designs on the bundled teacher under the same short distillation, on a CPU.

python benchmarks/gate_design.py --out benchmarks/results/cpu/gate_design.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.progress import track

from seerattention.distill import DistillConfig, Distiller, TextWindows
from seerattention.evals import bundled
from seerattention.evals.demo import LiveBatches
from seerattention.evals.needle import NeedleTask
from seerattention.evals.observe import Watch
from seerattention.evals.perplexity import perplexity
from seerattention.evals.retrieval import retrieval
from seerattention.evals.versions import versions
from seerattention.files import staged
from seerattention.gate import GateConfig
from seerattention.models import attach, detach, new_gates

POLICY = "top_k:0.1,sink_blocks=1"
POOLED = {"q_sub_block": None, "k_sub_block": None}


def designs(model: Any) -> dict[str, dict[str, Any]]:
    """Return gate settings by name, the published one first."""
    base = model.config
    published = GateConfig.published(
        num_heads=base.num_attention_heads, num_kv_heads=base.num_key_value_heads, head_dim=base.head_dim
    )
    shape = ("num_heads", "num_kv_heads", "head_dim")
    return {
        "published: q mean, one summary per block, random start": {
            k: v for k, v in asdict(published).items() if k not in shape
        },
        "one summary per block, identity start": POOLED,
        "16-token sub-blocks, identity start": {"q_sub_block": 16, "k_sub_block": 16},
        "8-token sub-blocks, random start": {"init": "random"},
        "8-token sub-blocks, identity start (default)": {},
    }


def measure(model: Any, tokenizer: Any, settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Distil gates of one design and measure them at 10 % density, no dense last rows."""
    training, text = bundled.text_tokens(tokenizer)
    torch.manual_seed(0)
    gates = new_gates(model, **settings)
    batches = LiveBatches(NeedleTask(tokenizer, training), TextWindows(training, args.length))
    steps = list(Distiller(model, gates, batches, DistillConfig(steps=args.steps, lr=args.lr)).run())
    documents = [NeedleTask(tokenizer, text).make(args.tokens, seed) for seed in range(args.documents)]
    watch = Watch()
    attach(model, gates, POLICY, min_tokens=0, observe=watch)
    try:
        found = retrieval(model, documents)
        loss = perplexity(model, text, window=args.tokens, windows=1)
    finally:
        detach(model)
    return {
        "parameters": sum(p.numel() for p in gates.parameters()),
        "loss": round(mean(s.loss for s in steps[-8:]), 4),
        "density": round(watch.density, 4),
        "perplexity": round(loss, 3),
        "needle": round(found, 4),
    }


def main() -> None:
    """Measure every design."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gate_design.json"), help="default: %(default)s"
    )
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="tokens per step (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=8192, help="tokens in evaluation (default: %(default)s)"
    )
    parser.add_argument("--documents", type=int, default=5, help="needle documents (default: %(default)s)")
    args = parser.parse_args()
    with staged(args.out.parent) as folder:
        model, tokenizer = bundled.load_teacher()
        rows = [
            {"design": name, **measure(model, tokenizer, settings, args)}
            for name, settings in track(designs(model).items(), "measuring")
        ]
        report = {
            "versions": versions(),
            "steps": args.steps,
            "length": args.length,
            "tokens": args.tokens,
            "questions": 8 * args.documents,
            "policy": POLICY,
            "rows": rows,
        }
        (folder / args.out.name).write_text(json.dumps(report, indent=2) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
