"""Calibrated thresholds of the bundled gates: do they keep their target at other lengths, and do they pay?

    PYTHONPATH=src python benchmarks/calibrate.py

calibrates on the bundled text's training part and measures on the rest of the text: targets at half, once
and twice the calibrated length; and at equal density perplexity against one global threshold and top-k.
Minutes on a CPU; the result is ``benchmarks/results/<device>/calibrate.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from seerattention.calibration.fit import Target, fit
from seerattention.calibration.gains import Maps, record
from seerattention.calibration.search import RECALL_ROWS
from seerattention.files import check_writable, write_json
from seerattention.hosts.transformers import Gates
from seerattention.measure import bundled
from seerattention.measure.compare import measured
from seerattention.measure.versions import versions
from seerattention.policies import Calibrated, Policy, Threshold, TokenBudget, TopK

#: What every policy reads besides: the first block, as the bundled gates' own policy does.
KNOBS = TopK(1.0, sink_blocks=1)

#: Relative difference of density at which a global threshold counts as equal.
EQUAL = 0.01


def calibrated(maps: Maps, target: Target, row_exponent: float | None = None) -> Calibrated:
    """Return the policy for a target."""
    more = {} if row_exponent is None else {"row_exponent": row_exponent}
    return Calibrated(fit(maps, target, **more), sink_blocks=KNOBS.sink_blocks)


class Bench:
    """The bundled model, its gates, and windows of held-out text.

    Args:
        length: Tokens of the calibration's windows.
        windows: Held-out windows of that length; half as many of twice the length, twice as many of half.
    """

    def __init__(self, length: int, windows: int) -> None:
        self.model, tokenizer = bundled.load_teacher()
        self.gates: Gates = bundled.load_teacher_gates()
        self.training, self.text = bundled.text_tokens(tokenizer)
        self.length, self.windows = length, windows
        self.began = time.perf_counter()

    def held_out(self, length: int) -> list[np.ndarray]:
        """Return windows of the held-out text, of as many tokens in all at every length."""
        count = max(1, self.windows * self.length // length)
        return [self.text[i * length : (i + 1) * length] for i in range(count)]

    def measure(self, name: str, policy: Policy, length: int) -> dict[str, Any]:
        """Measure a policy and print it."""
        found = measured(
            self.model, self.gates, policy, windows=self.held_out(length), recall_rows=RECALL_ROWS
        ).values()
        kept = ("tokens", "density", "recall", "perplexity")
        row = {"method": name, **{key: found[key] for key in kept}}
        print(f"{time.perf_counter() - self.began:5.0f} s", json.dumps(row), flush=True)
        return row

    def dense(self, length: int) -> float:
        """Return the perplexity without gates."""
        return measured(self.model, None, windows=self.held_out(length)).values()["perplexity"]

    def threshold(self, density: float, maps: Maps) -> dict[str, Any]:
        """Find the one threshold whose measured density is the given one, and measure it."""
        # The share above which the maps' rows have this density is near; then secants in logarithms.
        shares = maps.log_share[maps.log_share > -math.inf]
        limit = float(shares.quantile(1 - density)) if shares.numel() < 2**24 else math.log(1 / 128)
        slope, last = -1.5, None
        for _ in range(6):
            row = self.measure("one threshold", Threshold(math.exp(limit), sink_blocks=1), self.length)
            row["threshold"] = math.exp(limit)
            error = math.log(row["density"] / density)
            if abs(error) <= EQUAL:
                break
            if last is not None and abs(limit - last[0]) > 1e-6:
                slope = min(-0.2, (error - last[1]) / (limit - last[0]))
            last = limit, error
            limit -= error / slope
        return row

    def top_k(self, density: float) -> list[dict[str, Any]]:
        """Measure top-k, which has whole blocks only, with numbers of blocks on both sides of a density."""
        rows: list[dict[str, Any]] = []
        blocks = max(1, TopK(density).blocks(self.length // 64) - 1)
        while True:
            rows.append(self.measure("top-k", TokenBudget(64 * blocks, sink_blocks=1), self.length))
            if rows[-1]["density"] >= density:
                return rows[-2:]
            blocks += 1


def run(
    length: int, windows: int, densities: list[float], recalls: list[float], training: int
) -> dict[str, Any]:
    """Calibrate, measure and return the report."""
    bench = Bench(length, windows)
    count = min(training, len(bench.training) // length)
    texts = [bench.training[i * length : (i + 1) * length] for i in range(count)]
    maps = record(bench.model, bench.gates, texts, KNOBS)
    print(f"{time.perf_counter() - bench.began:5.0f} s recorded {count} windows", flush=True)
    lengths = [length // 2, length, 2 * length]
    dense = {str(n): bench.dense(n) for n in lengths}
    print("dense", dense, flush=True)
    targets, compared, exponents = [], [], []
    for target in [*(Target(density=d) for d in densities), *(Target(recall=r) for r in recalls)]:
        policy = calibrated(maps, target)
        rows = [bench.measure(f"{target.name} {target.value}", policy, n) for n in lengths]
        targets.append({"target": target.name, "value": target.value, "rows": rows})
    for entry in targets:
        if entry["target"] != "density":
            continue
        mine = entry["rows"][1]
        rows = [mine, bench.threshold(mine["density"], maps), *bench.top_k(mine["density"])]
        compared.append({"density": entry["value"], "rows": rows})
    for exponent in (0.0, -0.25, -1.0):
        policy = calibrated(maps, Target(density=densities[0]), exponent)
        exponents.append({"row_exponent": exponent, **bench.measure("row exponent", policy, length)})
    return {
        "versions": versions("cpu"),
        "calibrated_on": {"tokens": length, "windows": count},
        "held_out_tokens": windows * length,
        "dense": dense,
        "targets": targets,
        "compared": compared,
        "row_exponents": exponents,
    }


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=8192, help="of the windows (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=4, help="held-out windows (default: %(default)s)")
    parser.add_argument("--training", type=int, default=3, help="windows to calibrate on, at most")
    parser.add_argument("--densities", type=float, nargs="*", default=[0.1, 0.2, 0.05])
    parser.add_argument("--recalls", type=float, nargs="*", default=[0.9, 0.95])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu/calibrate.json"))
    args = parser.parse_args()
    check_writable(args.out)
    write_json(args.out, run(args.length, args.windows, args.densities, args.recalls, args.training))


if __name__ == "__main__":
    main()
