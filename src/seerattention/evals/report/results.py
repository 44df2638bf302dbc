"""The report's measurements: the summary of an evaluation, as ``seerattention eval`` writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from seerattention.evals.summary import NOTE, cells
from seerattention.files import read_json
from seerattention.measure.bundled import BUNDLED, TEACHER_NAME

#: What the page draws of a row.
NEEDED = (
    "task", "length", "method", "policy", "asked", "density", "samples", "planned", "metric", "score",
    "interval", "minus_dense", "minus_dense_interval", "prefill_s", "seconds", "faults",
)  # fmt: skip


def read_results(folder: Path) -> dict[str, Any]:
    """Read the results of an evaluation for the page.

    Args:
        folder: Where ``seerattention eval`` wrote them.

    Returns:
        What was measured with what, and ``rows``: those of ``summary.json``, each with the text of its
        table ``cells``.

    Raises:
        FileNotFoundError: If there is no summary in the folder.
        ValueError: If the file is no summary, or holds no rows.
    """
    path = folder / "summary.json"
    if not path.exists():
        if (folder / "samples.jsonl").exists():
            raise FileNotFoundError(
                f"{folder} holds samples but no summary.json: the evaluation still runs, or was killed; wait "
                "for it, or run the same 'seerattention eval CONFIG' again, which goes on and writes it"
            )
        raise FileNotFoundError(
            f"{folder} holds no results (no summary.json); give the folder that 'seerattention eval' wrote"
        )
    try:
        content = read_json(path)
        rows = [{**{name: row[name] for name in NEEDED}, "cells": cells(row)} for row in content["rows"]]
        about = {name: content[name] for name in ("model", "dtype", "text", "date", "versions")}
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{path} is not the summary of an evaluation ({type(error).__name__}: {error}); run "
            "'seerattention eval CONFIG' again, which writes it anew from the samples"
        ) from error
    if not rows:
        raise ValueError(f"{path} holds no rows; run 'seerattention eval CONFIG' to its end")
    if about["model"] == BUNDLED:
        about["model"] = TEACHER_NAME
    return {**about, "note": NOTE, "rows": rows}
