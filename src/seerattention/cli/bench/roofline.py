"""``seerattention bench roofline``: the picture of a prefill result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seerattention.cli.bench._reporter import result_of
from seerattention.files import write_whole


def run(
    report: Annotated[Path, typer.Argument(help="A result of bench prefill.")],
    out: Annotated[
        Path | None, typer.Option(help="The picture, .png or .svg; default beside the result.")
    ] = None,
) -> None:
    """Draw the rate over selected work against density under the device's ceilings; needs matplotlib."""
    from seerattention.bench.roofline import draw_roofline
    from seerattention.measure.plot import require_matplotlib

    picture = out or report.with_suffix(".png")
    require_matplotlib(picture)
    with result_of(report, "bench prefill") as measured:
        write_whole(picture, lambda path: draw_roofline(measured, path))
    print(picture)
