"""What the scripts beside it share: their command line, launches changed or tried, and the report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from seerattention.files import write_json
from seerattention.measure.timing import interleaved
from seerattention.measure.versions import versions

#: Where a launch stands: a table, or the names of a module, and the key in it.
Place = tuple[dict[Any, Any], Any]


def parser(doc: str | None, tokens: list[int], *, repeats: int = 5) -> argparse.ArgumentParser:
    """Return the command line that all scripts have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tokens", type=int, nargs="+", default=tokens, help="default: %(default)s")
    made.add_argument("--repeats", type=int, default=repeats, help="timed rounds (default: %(default)s)")
    made.add_argument("--out", type=Path, help="file for the results, JSON")
    return made


def kernel_parser(doc: str | None, tokens: list[int]) -> argparse.ArgumentParser:
    """Return the command line of a script that times kernels on a GPU."""
    made = parser(doc, tokens)
    made.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    made.add_argument("--set", nargs="+", default=[], metavar="LAUNCH.NAME=VALUE")
    made.add_argument("--sweep", action="store_true", help="try launches at every length instead")
    return made


def write(out: Path | None, rows: list[dict[str, Any]], device: str = "cuda", **settings: Any) -> None:
    """Write a report, whole or not at all; nothing without a file or rows."""
    if out is None or not rows:
        return
    about = {"versions": versions(device), "date": datetime.now(UTC).date().isoformat(), **settings}
    write_json(out, about | {"rows": rows})


def model_settings(model: Any, shape: str) -> dict[str, Any]:
    """Return what a report says of a model."""
    layers, dtype = model.config.num_hidden_layers, str(model.dtype).removeprefix("torch.")
    return {"shape": shape, "layers": layers, "dtype": dtype}


def times(seconds: list[float], digits: int = 3) -> dict[str, Any]:
    """Return a row's median and range in milliseconds."""
    low, high = min(seconds) * 1e3, max(seconds) * 1e3
    return {"ms": round(median(seconds) * 1e3, digits), "range_ms": [round(low, digits), round(high, digits)]}


def launches(tables: Mapping[str, dict[Any, Any]]) -> dict[str, Any]:
    """Return tables of launches as plain JSON types."""
    return {
        name: {str(key): asdict(launch) for key, launch in table.items()} for name, table in tables.items()
    }


def override(places: Mapping[str, list[Place]], texts: Iterable[str]) -> None:
    """Change launches, e.g. ``keys.stages=3``, or constants, e.g. ``SCORE_BYTES=1048576``."""
    for text in texts:
        path, _, value = text.partition("=")
        name, _, field = path.rpartition(".")
        known = places.get(path) or places.get(name)
        if known is None:
            raise ValueError(f"{text!r} names no launch; there are {', '.join(places)}")
        for table, key in known:
            table[key] = int(value) if path in places else _changed(table[key], field, int(value))


def _changed(launch: Any, field: str, value: int) -> Any:
    settings = asdict(launch)
    if field not in settings:
        raise ValueError(f"{field!r} is no setting of a launch; there are {sorted(settings)}")
    kind = bool if isinstance(settings[field], bool) else int
    return replace(launch, **{field: kind(value)})


def sweep(title: str, places: list[Place], tried: Iterable[Any], run: Callable[[], object]) -> None:
    """Print the times of a call under many launches, the best first."""
    before = [table[key] for table, key in places]
    variants: dict[str, Callable[[], object]] = {}
    for launch in tried:

        def under(launch: Any = launch) -> object:
            for table, key in places:
                table[key] = launch
            return run()

        try:
            under()
            torch.cuda.synchronize()
        except Exception as error:  # too much shared memory: another type in every version of Triton
            print(f"{title} {launch}: {type(error).__name__}", flush=True)
            continue
        variants[str(launch)] = under
    seconds = interleaved(variants, repeats=3, device="cuda")
    for (table, key), launch in zip(places, before, strict=True):
        table[key] = launch
    for name, found in sorted(seconds.items(), key=lambda item: median(item[1])):
        print(f"{title} {median(found) * 1e3:9.3f} ms  {name}", flush=True)
