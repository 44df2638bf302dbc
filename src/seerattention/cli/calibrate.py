"""``seerattention calibrate``: the answer to which threshold to use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from seerattention.cli._show import bar, console_of
from seerattention.files import locked, write_whole

if TYPE_CHECKING:
    from seerattention.policies import Policy

#: Shares of the windows fitted to that ask for what stands in them, and in which passages return. Of three
#: windows two ask, as was measured (docs/method.md).
RETRIEVAL = 0.6
REPEATS = 0.1


def run(
    gates: Annotated[Path, typer.Argument(help="Folder of gates, as distill or convert writes it.")],
    text: Annotated[
        list[Path], typer.Option(help="Text to calibrate on: .txt, .jsonl, code or a folder; repeatable.")
    ],
    density: Annotated[float | None, typer.Option(help="Fraction of blocks to read, e.g. 0.1.")] = None,
    recall: Annotated[float | None, typer.Option(help="Share of attention to keep, e.g. 0.95.")] = None,
    max_ppl_increase: Annotated[
        str, typer.Option(help="The most that perplexity may rise, e.g. 1%; the least density for it.")
    ] = "",
    model: Annotated[str, typer.Option(help="The gates' base model; default the one they name.")] = "",
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 8192,
    windows: Annotated[
        int, typer.Option(help="Windows of text; the last quarter, one at least, is for measuring.")
    ] = 4,
    retrieval: Annotated[
        float,
        typer.Option(
            help="Share of the windows fitted to that state things and ask for them, made from the text."
        ),
    ] = RETRIEVAL,
    repeats: Annotated[
        float, typer.Option(help="Share of the windows fitted to in which passages of the text return.")
    ] = REPEATS,
    out: Annotated[
        Path | None, typer.Option(help="Folder for a copy of the gates; default the gates' own folder.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture of the trade-off, .png or .svg.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Precision of the base model: auto, float32, bfloat16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; default the GPU if any.")] = "",
) -> None:
    """Find a threshold for every head that meets a target at any length; give exactly one target.

    Fits to windows most of which ask for what stands in them, to the nearest whole window of a share, and
    measures on the text as it is. Saves the thresholds with the gates as their default policy, calibrated;
    sink_blocks, local_blocks and dense_last_rows stay those of the policy the gates were saved with.
    """
    from seerattention.calibration.figure import draw_calibration
    from seerattention.calibration.fit import Target
    from seerattention.calibration.search import calibrate
    from seerattention.hosts.transformers import load_gates, save_calibration, save_gates
    from seerattention.measure import bundled
    from seerattention.measure.plot import require_matplotlib
    from seerattention.train import read_tokens
    from seerattention.train.data import text_files
    from seerattention.train.mixture import check_shares, mixed

    target = Target(density, recall, _share(max_ppl_increase))
    check_shares(retrieval, repeats)
    if plot is not None:
        require_matplotlib(plot)
    loaded = bundled.for_prefill(load_gates(gates))
    _check_place(gates, out)
    text_files(text)
    with locked(out or gates):
        base, tokenizer = bundled.named_model(model or loaded.base.name, dtype=dtype, device=device)
        knobs = _knobs(loaded.policy)
        console = console_of()
        with bar(console) as progress:
            outcome = calibrate(
                base,
                loaded.to(base.device),
                read_tokens(text, tokenizer),
                target,
                length=length,
                windows=windows,
                knobs=knobs,
                mix=partial(mixed, tokenizer=tokenizer, retrieval=retrieval, repeats=repeats),
                progress=_phases(progress, console),
            )
        if out is None:
            save_calibration(gates, outcome.policy)
        else:
            loaded.cpu().calibration = outcome.policy.calibration
            save_gates(loaded, out, policy=outcome.policy)
    for row in outcome.rows:
        console.print(
            f"{row['tokens']:>9,} tokens   density {row['density']:6.1%}   recall {row['recall']:6.1%}   "
            f"perplexity {row['perplexity']:.2f}, dense {row['dense_perplexity']:.2f}"
        )
    console.print(f"{outcome.policy} {outcome.recommendation()}", soft_wrap=True)
    console.print(f"saved in {out or gates}; attach(model, load_gates(...)) uses it")
    if plot is not None:
        write_whole(plot, lambda path: draw_calibration(outcome, path))
        console.print(f"drawn in {plot}")


def _share(text: str) -> float | None:
    """Read ``1%`` or ``0.01``."""
    if not text:
        return None
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        return float(number) / (100 if percent else 1)
    except ValueError:
        raise ValueError(f"--max-ppl-increase must be like 1% or 0.01, got {text!r}") from None


def _check_place(gates: Path, out: Path | None) -> None:
    """Refuse before any work what could not be saved."""
    from seerattention.hosts.transformers.checkpoint import WEIGHTS, check_replaceable

    if out is not None:
        check_replaceable(out)
        return
    if not (gates / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"{gates} holds no {WEIGHTS} that thresholds could be saved with; give --out for a copy"
        )


def _knobs(text: str | None) -> Policy:
    """Return the common knobs of the policy that gates were saved with."""
    from seerattention.policies import TopK, parse

    if not text:
        return TopK(1.0, sink_blocks=1)
    # Knobs are written alike in all policies.
    return parse(",".join(["top_k:1", *text.split(",")[1:]]))


def _phases(progress: Progress, console: Console) -> Callable[[str, int], Callable[[], None]]:
    def start(phase: str, steps: int) -> Callable[[], None]:
        if not console.is_terminal:
            console.print(phase)
        task = progress.add_task(phase, total=steps)
        return lambda: progress.advance(task)

    return start
