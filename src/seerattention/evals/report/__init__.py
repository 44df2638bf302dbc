"""One self-contained HTML page of what was measured and of what gates choose: ``seerattention report``.

The page is assembled from the files beside this one: ``page.html``, ``page.css`` and the scripts, with its
data as JSON inside. It loads nothing, by its own content security policy, and works from a file.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

from seerattention.evals.report.explorer import explore as explore
from seerattention.evals.report.explorer import fitting_layers as fitting_layers
from seerattention.evals.report.results import read_results as read_results

HERE = Path(__file__).parent

#: In the order in which they run.
SCRIPTS = ("common.js", "curves.js", "explorer.js", "start.js")


def page(results: dict[str, Any] | None, explorer: dict[str, Any] | None) -> str:
    """Return the page, HTML.

    Args:
        results: From `read_results`, or None for a page without measurements.
        explorer: From `explore`, or None for a page without maps.

    Raises:
        ValueError: If both are None: there would be nothing to see.
    """
    if results is None and explorer is None:
        raise ValueError("a report needs results of an evaluation, or a model and its gates, or both")
    data = {"date": date.today().isoformat(), "results": results, "explorer": explorer}
    # Inside <script>, only "</script" and "<!--" could end or change what the browser reads.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )
    parts = {
        "{{css}}": _file("page.css"),
        "{{script}}": "\n".join(_file(name) for name in SCRIPTS),
        "{{data}}": text,
    }
    html = _file("page.html")
    for place, part in parts.items():
        # Split, not replaced one after the other: a part may hold what looks like another's place.
        before, _, after = html.partition(place)
        html = f"{before}{part}{after}"
    return html


def _file(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
