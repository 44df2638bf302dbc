"""``seerattention demo``: the whole method on a bundled model, in minutes and without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from seerattention.cli._show import bar, console_of, formatted, train
from seerattention.files import check_writable, write_json, write_whole

if TYPE_CHECKING:
    from seerattention.demo.run import Demo, Method
    from seerattention.hosts.transformers import Gates

#: Tokens per sequence of the live distillation, and the bounds of its number of steps.
LIVE_TOKENS, FEWEST_STEPS, MOST_STEPS = 2048, 20, 200

#: Columns of the tables, and how a row's values are written.
METHODS = {
    "method": "{method}",
    "density": "{density:.1%}",
    "perplexity": "{perplexity:.2f}",
    "needles": "{needle:.0%}",
    "last rows dense": "{needle_dense_last:.0%}",
    "recall": "{recall:.1%}",
    "prefill s": "{prefill_s:.2f}",
    "speedup": "{speedup:.2f}x",
}
TIMES = {
    "tokens": "{tokens:,}",
    "model dense s": "{dense_prefill_s:.2f}",
    "model sparse s": "{sparse_prefill_s:.2f}",
    "model speedup": "{prefill_speedup:.2f}x",
    "layer dense ms": "{dense:.0f}",
    "layer sparse ms": "{sparse:.0f}",
    "choosing ms": "{select:.0f}",
    "attention speedup": "{attention_speedup:.1f}x",
    "with choosing": "{both:.1f}x",
}


def run(
    out: Annotated[Path, typer.Option(help="Folder for report.json and the figures.")] = Path("runs/demo"),
    distil_seconds: Annotated[
        int, typer.Option(help="About how long to distil gates live, in seconds; 0 skips it.")
    ] = 50,
    longest: Annotated[
        int, typer.Option(help="Tokens up to which prefill is timed; the longest take most of the time.")
    ] = 32768,
) -> None:
    """Distil gates, compare dense attention and other methods, draw pictures; under 6 minutes on 2 cores."""
    from dataclasses import replace

    from seerattention.demo import figures
    from seerattention.demo.run import Demo, Plan, methods
    from seerattention.measure import bundled
    from seerattention.measure.plot import require_matplotlib
    from seerattention.measure.versions import versions
    from seerattention.policies import TopK

    require_matplotlib()
    plan = Plan()
    if longest < (least := min(plan.lengths)):
        raise ValueError(f"--longest must be at least {least}, got {longest}")
    plan = replace(plan, lengths=tuple(n for n in plan.lengths if n <= longest))
    console = console_of(110)
    check_writable(out, folder=True)
    model, tokenizer = bundled.load_teacher()
    training, text = bundled.text_tokens(tokenizer)
    gates = bundled.load_teacher_gates()
    demo = Demo(model, tokenizer, text, plan)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"The teacher: a {parameters / 1e6:.1f} M parameter Llama with a context of "
        f"{model.config.max_position_embeddings:,} tokens.\n"
        f"The text: The Enchanted April (1922), {len(training) + len(text):,} tokens it never saw.\n",
    )
    live = _distil(demo, training, distil_seconds, console)
    rows = _compare(demo, methods(gates, live), console)
    curve = _curve(demo, gates, console)
    maps = figures.head_maps(model, gates, text[: demo.plan.tokens], TopK(0.1, sink_blocks=1))
    pictures = {
        "maps.png": lambda path: figures.draw_maps(maps, path),
        "quality.png": lambda path: figures.draw_quality(rows, path),
        "time.png": lambda path: figures.draw_time(curve, path),
    }
    for name, draw in pictures.items():
        write_whole(out / name, draw)
    report = {
        "versions": versions(),
        "rows": rows,
        "questions": demo.questions,
        "lengths": curve,
        "figures": list(pictures),
    }
    write_json(out / "report.json", report)
    console.print(
        f"\n{out}/report.json has these numbers; the pictures beside it:\n"
        "  maps.png     true attention map, the gate's prediction and the blocks read, for four heads\n"
        "  quality.png  needles and perplexity against density\n"
        "  time.png     prefill time against length"
    )


def _distil(demo: Demo, training: Any, seconds: int, console: Console) -> Gates | None:
    """Distil gates from their initialisation for about ``seconds``."""
    import torch

    from seerattention.demo.run import LiveBatches
    from seerattention.hosts.transformers import new_gates
    from seerattention.measure.needle import NeedleTask
    from seerattention.train import DistillConfig, Distiller, TextWindows

    if not seconds:
        return None
    batches = LiveBatches(NeedleTask(demo.tokenizer, training), TextWindows(training, LIVE_TOKENS))
    torch.manual_seed(0)
    # One step on gates of its own tells how many fit into the time.
    probe = next(Distiller(demo.model, new_gates(demo.model), batches).run())
    steps = max(FEWEST_STEPS, min(MOST_STEPS, round(seconds / probe.seconds)))
    gates = new_gates(demo.model)
    console.print(
        f"1. The teacher teaches gates to predict its attention, from their initialisation: {steps} steps of "
        f"{LIVE_TOKENS:,} tokens"
    )
    config = DistillConfig(steps=steps, lr=2e-3, objective="kl")
    # Up to the length that is measured.
    done = train(Distiller(demo.model, gates, batches, config, reach=demo.plan.tokens), console)
    few = max(1, min(8, len(done) // 4))

    def mean(steps: list[Any], name: str) -> float:
        return sum(getattr(s, name) for s in steps) / len(steps)

    first, last = done[:few], done[-few:]
    console.print(
        f"   loss {mean(first, 'loss'):.4f} -> {mean(last, 'loss'):.4f}, recall of the map's mass at 10 % "
        f"density {mean(first, 'recall'):.3f} -> {mean(last, 'recall'):.3f} (means of {few} steps)\n"
    )
    return gates


def _compare(demo: Demo, methods: list[Method], console: Console) -> list[dict[str, Any]]:
    """Measure every method and print the table."""
    console.print(
        f"2. Dense attention and what reads less, at {demo.plan.tokens:,} tokens: perplexity over "
        f"{demo.plan.windows} windows, {demo.questions} needle questions in {demo.plan.documents} documents"
    )
    rows: list[dict[str, Any]] = []
    with bar(console) as progress:
        for method in progress.track(methods, description="measuring"):
            rows.append(demo.measure(method, rows[0]["prefill_s"] if rows else None))
            if not console.is_terminal:
                console.print(f"  measured {method.name}")
    console.print(formatted(METHODS, rows))
    console.print(
        "   needles: numbers found in the text; 'last rows dense': the same with the last two query blocks,\n"
        "   where the questions stand, dense. recall: share of the true attention mass in the blocks read.\n"
        "   The oracle reads the true map first, which costs more than it saves: a bound, not a method.\n"
    )
    return rows


def _curve(demo: Demo, gates: Gates, console: Console) -> list[dict[str, Any]]:
    """Time dense and sparse over the lengths and print the table."""
    density = demo.plan.density
    console.print(f"3. Time against length: dense SDPA and the gates at {density:.0%} density")
    with bar(console) as progress:
        task = progress.add_task("timing", total=sum(demo.plan.lengths))
        rows = []
        for length in demo.plan.lengths:
            rows.append(demo.time(gates, length))
            progress.advance(task, length)
    console.print(formatted(TIMES, map(_in_ms, rows)))
    console.print(
        "   layer: the attention of one layer alone; choosing: pooling, scores and policy of that layer."
    )
    return rows


def _in_ms(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the curve with what one layer took in milliseconds."""
    names = "dense_attention_s", "sparse_attention_s", "selection_s"
    dense, sparse, select = (row[name] * 1e3 for name in names)
    return row | {"dense": dense, "sparse": sparse, "select": select, "both": dense / (sparse + select)}
