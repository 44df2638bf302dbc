"""Write the README's pictures of the report, light and dark, for the bundled model.

python -m docs.report, after the evaluation that it shows:
seerattention eval recipes/eval/report.toml
"""

from __future__ import annotations

import base64
import io
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from seerattention.cli.report import run as report
from tests.browser import chromium, screen

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "eval"
FIGURES = ROOT / "docs" / "figures"
WIDTH, HEIGHT = 1240, 1100

#: What each picture spans: from the top of one element to the bottom of another.
PICTURES = {"report-curves": ("quality", "charts"), "report-explorer": ("explorer", "map-legend")}


def picture(driver: Any, first: str, last: str) -> Image.Image:
    """Return what the page shows between two elements."""
    ends = "const box = (id) => document.getElementById(id).getBoundingClientRect();"
    top, bottom = driver.execute_script(
        f"{ends} return [box(arguments[0]).top + scrollY, box(arguments[1]).bottom + scrollY]", first, last
    )
    clip = {"x": 0, "y": top - 8, "width": WIDTH, "height": bottom - top + 16, "scale": 1}
    options = {"format": "png", "clip": clip, "captureBeyondViewport": True}
    taken = driver.execute_cdp_cmd("Page.captureScreenshot", options)
    return Image.open(io.BytesIO(base64.b64decode(taken["data"])))


def main() -> None:
    """Write the pictures."""
    with tempfile.TemporaryDirectory() as folder, chromium() as driver:
        page = Path(folder) / "report.html"
        report(
            results=RESULTS, gates="bundled", model="", text=None, tokens=4096, density=None, layers="",
            out=page, dtype="auto", device="cpu",
        )  # fmt: skip
        for scheme in ("light", "dark"):
            driver.get(page.as_uri())
            screen(driver, width=WIDTH, height=HEIGHT, scale=1.5, prefers_color_scheme=scheme)
            for name, (first, last) in PICTURES.items():
                path = FIGURES / f"{name}-{scheme}.png"
                taken = picture(driver, first, last).convert("RGB")
                # A palette is a third of the size; spread first, so that no mark loses its colour.
                few = taken.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
                few.save(path, optimize=True)
                print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
