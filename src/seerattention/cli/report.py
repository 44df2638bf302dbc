"""``seerattention report``: what was measured and what gates select, as one page for a browser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from seerattention.cli._show import bar, console_of
from seerattention.files import check_writable, write_whole

if TYPE_CHECKING:
    import numpy as np

    from seerattention.hosts.transformers import Gates
    from seerattention.policies import Policy

#: Densities that the explorer offers where none is asked for.
DENSITIES = (0.2, 0.1, 0.05)


def run(
    results: Annotated[
        Path | None, typer.Option("--eval", help="Folder of results, as seerattention eval writes it.")
    ] = None,
    gates: Annotated[
        str,
        typer.Option(
            help='Folder or hub id of gates to explore, or "bundled"; default that, without --eval.'
        ),
    ] = "",
    model: Annotated[str, typer.Option(help="The gates' base model; default the one they name.")] = "",
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text whose maps are shown: .txt, .jsonl or a folder; may be repeated. Default the bundled "
            "novel; for the bundled model with eight numbers hidden in it, asked for at its end."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Of the text, from its start.")] = 4096,
    density: Annotated[
        list[float] | None,
        typer.Option(
            help="Fraction of the blocks to read, as top_k with the first block; may be repeated. Default "
            "0.2, 0.1 and 0.05. The policy saved with the gates comes first, a calibrated one too."
        ),
    ] = None,
    layers: Annotated[
        str, typer.Option(help="Layers to show, e.g. 0,7,15; default as many as fit into a page, evenly.")
    ] = "",
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    dtype: Annotated[
        str, typer.Option(help="Precision of the base model: auto, float32, bfloat16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; default the GPU if any.")] = "",
) -> None:
    """Write one HTML page: quality against density, tables, and an explorer of the maps and selections.

    It needs no network and opens from a file. Give results, gates, or both; with neither, the bundled
    model and its gates are explored.
    """
    from transformers.utils import logging

    from seerattention.evals.report import page, read_results
    from seerattention.measure.bundled import BUNDLED

    console = console_of()
    logging.disable_progress_bar()
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give --out a file, such as {out / 'report.html'}")
    if results is not None and not gates and (model or text or density or layers):
        raise ValueError("--model, --text, --density and --layers are for the explorer; give --gates too")
    check_writable(out)
    measured = None if results is None else read_results(results)
    explorer = None
    if gates or results is None:
        source = gates or BUNDLED
        explorer = _explore(console, source, model, text or [], tokens, density or [], layers, dtype, device)
    write_whole(out, lambda path: path.write_text(page(measured, explorer), encoding="utf-8"))
    console.print(f"{out}: {out.stat().st_size / 1e6:.1f} MB; open it in a browser", soft_wrap=True)


def _explore(
    console: Console,
    source: str,
    model: str,
    text: list[Path],
    tokens: int,
    densities: list[float],
    layers: str,
    dtype: str,
    device: str,
) -> dict[str, Any]:
    """Load model, gates and text, and return the explorer's data."""
    from seerattention.evals.report import explore
    from seerattention.measure import bundled
    from seerattention.measure.compare import short_of
    from seerattention.train.data import text_files

    text_files(text)
    loaded = bundled.named_gates(source)
    chosen, policies = _numbers(layers), _policies(loaded, densities)
    base, tokenizer = bundled.named_model(model or loaded.base.name, dtype=dtype, device=device)
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ValueError(f"--tokens {tokens:,} is past the model's limit of {limit:,}; give fewer")
    # The bundled model learned to find numbers; what others do with the questions would say little.
    needles = loaded.base.name == bundled.TEACHER_NAME
    window, name = _window(text, tokenizer, tokens, needles)
    for why in filter(None, (short_of(loaded, policy, tokens) for policy in policies)):
        console.print(f"too short: {why}", markup=False)
    with bar(console) as progress:
        task = progress.add_task("maps", total=base.config.get_text_config().num_hidden_layers)
        explorer = explore(
            base,
            tokenizer,
            loaded.to(base.device),
            window,
            policies,
            layers=chosen,
            step=lambda: progress.advance(task),
        )
    if len(explorer["layers"]) < len(explorer["all_layers"]) and chosen is None:
        console.print(
            f"maps of layers {', '.join(map(str, explorer['layers']))}: all "
            f"{len(explorer['all_layers'])} would make the page too large; --layers chooses others",
        )
    explorer["text"] = name
    return explorer


def _numbers(layers: str) -> list[int] | None:
    if not layers:
        return None
    try:
        return [int(number) for number in layers.split(",")]
    except ValueError:
        raise ValueError(f"--layers must be like 0,7,15, got {layers!r}") from None


def _policies(gates: Gates, densities: list[float]) -> list[Policy]:
    """Return the policy saved with the gates, if any, and top-k at every density."""
    from seerattention.policies import TopK, parse

    found = [parse(gates.policy, gates.calibration)] if gates.policy else []
    if gates.calibration is not None and not any(p.name == "calibrated" for p in found):
        found.insert(0, parse("calibrated", gates.calibration))
    asked = sorted(densities or DENSITIES, reverse=True)
    return list(dict.fromkeys([*found, *(TopK(d, sink_blocks=1) for d in asked)]))


def _window(text: list[Path], tokenizer: Any, tokens: int, needles: bool) -> tuple[np.ndarray, str]:
    """Return the tokens whose maps are shown, and what they are."""
    from seerattention.measure import bundled
    from seerattention.measure.needle import NeedleTask
    from seerattention.train import read_tokens

    if tokens < 1:
        raise ValueError(f"--tokens must be at least 1, got {tokens}")
    if text:
        found, name = read_tokens(text, tokenizer), ", ".join(path.name for path in text)
    else:
        found, name = bundled.text_tokens(tokenizer)[1], "the bundled novel"
    if len(found) < tokens:
        raise ValueError(
            f"the text has {len(found):,} tokens, --tokens asks for {tokens:,}; give more text or fewer"
        )
    if text or not needles:
        return found[:tokens], name
    hidden = f"{name}, eight numbers hidden in it and asked for at its end"
    return NeedleTask(tokenizer, found).make(tokens, 0).tokens, hidden
