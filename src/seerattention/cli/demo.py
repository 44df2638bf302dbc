"""``seerattention demo``: the whole method on one model, the bundled one or another, without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from seerattention.cli._show import bar, console_of, formatted, train
from seerattention.cli._training import not_understood
from seerattention.files import check_writable, write_json, write_whole

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from seerattention.demo.run import Demo, Method, Plan
    from seerattention.hosts.transformers import Gates
    from seerattention.wording import Wording

#: Bounds of the number of steps of the live distillation.
FEWEST_STEPS, MOST_STEPS = 20, 200

#: What stands for the model of recipes/smollm2; where the recipe makes it, and where its gates are.
SMOLLM2, SMOLLM2_MODEL, SMOLLM2_GATES = "smollm2", Path("runs/smollm2"), Path("recipes/smollm2/gates")

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
    model: Annotated[
        str,
        typer.Option(
            help='"bundled"; "smollm2", the folder that recipes/smollm2 makes; or another folder or hub id.'
        ),
    ] = "bundled",
    gates: Annotated[
        str, typer.Option(help="Folder or hub id of the model's gates; bundled and smollm2 have their own.")
    ] = "",
    out: Annotated[Path, typer.Option(help="Folder for report.json and the figures.")] = Path("runs/demo"),
    distil_seconds: Annotated[
        int, typer.Option(help="About how long to distil gates live, in seconds; 0 skips it.")
    ] = 50,
    longest: Annotated[
        int,
        typer.Option(
            help="Tokens up to which prefill is timed; the longest take most of the time. Other models than "
            "the bundled one are timed up to 4,096."
        ),
    ] = 32768,
) -> None:
    """Distil gates, compare dense attention and other methods, draw pictures; under 6 minutes on 2 cores.

    With smollm2, of 135 M parameters, under 10 minutes; other models take more or less by their size.
    """
    from dataclasses import replace

    from transformers.utils import logging

    from seerattention.demo.run import LARGER, Demo, Plan, methods
    from seerattention.hosts.transformers.load import load_config
    from seerattention.hosts.transformers.rotary import position_limit
    from seerattention.measure import bundled
    from seerattention.measure.compare import attached
    from seerattention.measure.plot import require_matplotlib
    from seerattention.policies import TopK
    from seerattention.wording import TEACHERS

    require_matplotlib()
    teacher = model in (bundled.BUNDLED, bundled.TEACHER_NAME)
    plan = Plan()
    if not teacher:
        model, gates = _named(model, gates)
        plan = LARGER.within(position_limit(load_config(model)))
    if longest < (least := min(plan.lengths)):
        raise ValueError(f"--longest must be at least {least}, got {longest}")
    plan = replace(plan, lengths=tuple(n for n in plan.lengths if n <= longest))
    console = console_of(110)
    check_writable(out, folder=True)
    logging.disable_progress_bar()
    scorer = bundled.named_gates(gates or bundled.BUNDLED).float()
    base, tokenizer = bundled.named_model(model, dtype="float32", device="cpu")
    # Gates of another model are refused before any work.
    with attached(base, scorer, TopK(plan.density, sink_blocks=1)):
        pass
    training, text = bundled.text_tokens(tokenizer)
    size, tokens = sum(p.numel() for p in base.parameters()) / 1e6, len(training) + len(text)
    said = f"The model: {model}, {size:.1f} M parameters"
    if teacher:
        said = f"The teacher: a {size:.1f} M parameter Llama"
    if limit := position_limit(base.config):
        said += f" with a context of {limit:,} tokens"
    said += ".\n" if teacher else f".\nThe gates: {gates}.\n"
    read = "it never saw" if teacher else "it may have read before"
    console.print(f"{said}The text: The Enchanted April (1922), {tokens:,} tokens {read}.\n")
    wording = TEACHERS if teacher else _wording(base, tokenizer, text, plan, console)
    demo = Demo(base, tokenizer, text, plan, wording)
    live = _distil(demo, training, distil_seconds, scorer.config.block_size, console)
    rows = _compare(demo, methods(scorer, live, demo.plan.density), console)
    curve = _curve(demo, scorer, console)
    _write(out, model, demo, scorer, rows, curve)
    console.print(
        f"\n{out}/report.json has these numbers; the pictures beside it:\n"
        "  maps.png     true attention map, the gate's prediction and the blocks read, for four heads\n"
        f"  quality.png  {'needles and perplexity' if demo.documents else 'perplexity'} against density\n"
        "  time.png     prefill time against length"
    )


def _named(model: str, gates: str) -> tuple[str, str]:
    """Return where a model and its gates are.

    Raises:
        FileNotFoundError: If the recipe's model or gates are asked for and not there.
        ValueError: If a model has no gates that are known.
    """
    if model != SMOLLM2:
        if not gates:
            raise ValueError(
                f"give the gates of {model} by --gates; seerattention distill makes them from a text"
            )
        return model, gates
    if not gates and not SMOLLM2_GATES.is_dir():
        raise FileNotFoundError(
            f"there is no {SMOLLM2_GATES} here; run this in a clone of the repository, which has them, or "
            "give --gates"
        )
    if not SMOLLM2_MODEL.is_dir():
        raise FileNotFoundError(
            f"there is no {SMOLLM2_MODEL} here; make it, in a clone of the repository, by `pip install gguf` "
            "and `python recipes/smollm2/make_model.py`"
        )
    return str(SMOLLM2_MODEL), gates or str(SMOLLM2_GATES)


def _wording(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: np.ndarray, plan: Plan, console: Console
) -> Wording | None:
    """Return the wording of needles that a model answers best; None where it answers none."""
    from dataclasses import replace

    from seerattention.demo.run import needles
    from seerattention.measure.needle import wordings
    from seerattention.measure.retrieval import understood

    tried = {wording.name: wording for wording in wordings(tokenizer)}
    one = replace(plan, documents=1)
    asked = {name: needles(tokenizer, text, one, wording) for name, wording in tried.items()}
    console.print(f"Needle questions in {len(tried)} wordings, to find which of them the model understands")
    with bar(console) as progress:
        task = progress.add_task("asking", total=len(tried))
        name, found = understood(model, asked, lambda: progress.advance(task))
    why = not_understood(name, found, plan.tokens)
    console.print(f"   not measured: {why}\n" if why else f"   it finds most in {name}: {found:.0%}\n")
    return None if why else tried[name]


def _distil(demo: Demo, training: Any, seconds: int, block: int, console: Console) -> Gates | None:
    """Distil gates for blocks of so many tokens from their initialisation, for about ``seconds``."""
    import torch

    from seerattention.demo.run import LiveBatches
    from seerattention.hosts.transformers import new_gates
    from seerattention.hosts.transformers.rotary import why_no_gaps
    from seerattention.measure.needle import NeedleTask
    from seerattention.train import DistillConfig, Distiller, TextWindows

    if not seconds:
        return None
    tokens, words = demo.plan.live_tokens, demo.wording
    task = None if words is None else NeedleTask(demo.tokenizer, training, wording=words)
    batches = LiveBatches(task, TextWindows(training, tokens))
    torch.manual_seed(0)
    # One step on gates of its own tells how many fit into the time.
    probe = next(Distiller(demo.model, new_gates(demo.model, block_size=block), batches).run())
    steps = max(FEWEST_STEPS, min(MOST_STEPS, round(seconds / probe.seconds)))
    gates = new_gates(demo.model, block_size=block)
    console.print(
        f"1. The model teaches gates to predict its attention, from their initialisation: {steps} steps of "
        f"{tokens:,} tokens"
    )
    config = DistillConfig(steps=steps, lr=2e-3, objective="kl")
    # Up to the length that is measured, where positions can have gaps.
    reach = None if why_no_gaps(demo.model.config) else demo.plan.tokens
    done = train(Distiller(demo.model, gates, batches, config, reach=reach), console)
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
    asked, note, hidden = "", "", {"needles", "last rows dense"}
    if demo.documents:
        hidden = set()
        asked = f", {demo.questions} needle questions in {len(demo.documents)} documents"
        note = (
            "   needles: numbers found in the text; 'last rows dense': the same with the last two query\n"
            "   blocks dense, as the published code has them.\n"
        )
    console.print(
        f"2. Dense attention and what reads less, at {demo.plan.tokens:,} tokens: perplexity over "
        f"{demo.plan.windows} {'window' if demo.plan.windows == 1 else 'windows'}{asked}"
    )
    rows: list[dict[str, Any]] = []
    with bar(console) as progress:
        for method in progress.track(methods, description="measuring"):
            rows.append(demo.measure(method, rows[0]["prefill_s"] if rows else None))
            if not console.is_terminal:
                console.print(f"  measured {method.name}")
    console.print(formatted({title: form for title, form in METHODS.items() if title not in hidden}, rows))
    console.print(
        f"{note}   recall: share of the true attention mass in the blocks read.\n"
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


def _write(
    out: Path, model: str, demo: Demo, gates: Gates, rows: list[dict[str, Any]], curve: list[dict[str, Any]]
) -> None:
    """Draw the pictures and write the report."""
    from seerattention.demo import figures
    from seerattention.measure.versions import versions
    from seerattention.policies import TopK

    maps = figures.head_maps(
        demo.model, gates, demo.text[: demo.plan.tokens], TopK(demo.plan.density, sink_blocks=1)
    )
    pictures = {
        "maps.png": lambda path: figures.draw_maps(maps, path),
        "quality.png": lambda path: figures.draw_quality(rows, path),
        "time.png": lambda path: figures.draw_time(curve, path),
    }
    for name, draw in pictures.items():
        write_whole(out / name, draw)
    report = {
        "versions": versions(),
        "model": model,
        "rows": rows,
        "questions": demo.questions,
        **({"wording": demo.wording.name} if demo.wording else {}),
        "lengths": curve,
        "figures": list(pictures),
    }
    write_json(out / "report.json", report)
