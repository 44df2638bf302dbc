"""``seerattention bench decode``: a step of decoding, its parts and its peers, as JSON, table and picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from seerattention.cli._show import bar, console_of, formatted
from seerattention.cli.bench._reporter import ProgressReporter
from seerattention.files import check_writable, write_json, write_whole

#: Columns of the table, and how a row's values are written.
COLUMNS = {
    "batch": "{batch}",
    "tokens": "{tokens:,}",
    "variant": "{variant}",
    "us": "{us:.4g}",
    "range": "{low:.4g}-{high:.4g}",
    "TB/s": "{tb_s}",
    "of dense": "{share_of_dense:.1%}",
    "speedup": "{speedup:.2f}x",
}


def run(
    out: Annotated[Path, typer.Option(help="File for the results, JSON.")] = Path("runs/decode.json"),
    figure: Annotated[
        Path | None, typer.Option(help="Picture; default beside the results where matplotlib is installed.")
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="BATCHxTOKENS, sequences and tokens of each; repeatable.")
    ] = None,
    density: Annotated[float, typer.Option(help="Share of blocks read.")] = 0.1,
    block: Annotated[int, typer.Option(help="Tokens per block.")] = 64,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            help="Whose choosing is timed: default, sub<n> (n keys per summary), quest, none; repeatable."
        ),
    ] = None,
    page: Annotated[
        list[int] | None, typer.Option(help="Tokens per page of a paged cache; 0 for none; repeatable.")
    ] = None,
    peers: Annotated[
        str, typer.Option(help="Dense kernels of a GPU, of cudnn and fa2; the best one gives the speedups.")
    ] = "cudnn,fa2",
    peer: Annotated[
        list[str] | None,
        typer.Option(help="A further peer, flashinfer or module:function(q, k, v, selection); repeatable."),
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="KV heads.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Dimension of a head.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed rounds; the variants take turns.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda; default the GPU if any.")] = "",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
) -> None:
    """Time a step of decoding against dense kernels and peers in one run, every output checked first.

    On a GPU a step is a CUDA graph. Defaults are the shape of Llama 3.1 8B on a GPU and that of the bundled
    model on a CPU.
    """
    import torch

    from seerattention.bench.bars import draw_speedups
    from seerattention.bench.decode import measure
    from seerattention.bench.plan import DECODE_DEFAULTS, DecodePlan
    from seerattention.measure.plot import require_matplotlib

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    given: dict[str, Any] = {
        "sizes": size and tuple(size_of(text) for text in size),
        "gates": [] if gate == ["none"] else gate,
        "pages": [] if page == [0] else page,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "dtype": dtype,
    }
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    plan = DecodePlan(
        **{**DECODE_DEFAULTS.get(device, DECODE_DEFAULTS["cpu"]), **given},
        density=density,
        block=block,
        peers=tuple(filter(None, peers.split(","))),
        extra=tuple(peer or ()),
        device=device,
        repeats=repeats,
    )
    if figure is not None:
        require_matplotlib(figure)
    console = console_of()
    report: dict[str, Any] = {}
    check_writable(out)
    with bar(console) as progress:
        for report in measure(plan, ProgressReporter(console, progress)):
            # Large sizes come last: what is stopped there keeps what it has.
            write_json(out, report)
    console.print(f"{report['versions']['device']}: copy {report['ceilings']['copy_tbs']:.3f} TB/s")
    console.print(formatted(COLUMNS, [_cells(row) for row in report["rows"]]))
    console.print(f"{out} has these numbers")
    if figure is None and importlib.util.find_spec("matplotlib") is None:
        console.print("no picture without matplotlib")
        return
    figure = figure or out.with_suffix(".png")
    write_whole(figure, lambda path: draw_speedups(report, path))
    console.print(f"{figure} is its picture")


def size_of(text: str) -> tuple[int, int]:
    """Read sequences and tokens of each.

    Raises:
        ValueError: If the text has another form.
    """
    batch, _, tokens = text.partition("x")
    if not (batch.isdecimal() and tokens.isdecimal()):
        raise ValueError(f"a size must be BATCHxTOKENS, e.g. 8x131072, got {text!r}")
    return int(batch), int(tokens)


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with times in microseconds."""
    low, high = (ms * 1e3 for ms in row["range_ms"])
    return row | {"us": row["ms"] * 1e3, "low": low, "high": high, "tb_s": row["tb_s"] or ""}
