"""What choosing by cheaper approximations would lose, before anybody writes a kernel for them.

    python -m experiments.approximate.run ranking --model M --gates G --heldout BOOKS --out runs/approximate
    python -m experiments.approximate.run quality --model M --gates G --heldout BOOKS --out runs/approximate

Every way of `experiments.approximate.ways` chooses as many blocks as the exact one by the same gates.
``ranking`` reads held-out text densely, and says which of the exact way's blocks each chooses and how much
attention is in them. ``quality`` measures perplexity and numbers found as `experiments.prefill_gates.run`
does, of ways that are named; a run that was stopped goes on. Results are in OUT/ranking.json and
OUT/quality.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.approximate.table import table
from experiments.approximate.ways import TILE, Layer, Way, bounded, ways
from experiments.prefill_gates.run import foreseen, losses
from experiments.variants import POLICY, questions, windows_of
from seerattention.files import read_json, write_json
from seerattention.gate import AttnGate
from seerattention.hosts.transformers import AttentionCall, Gates
from seerattention.measure import bundled
from seerattention.measure.maps import record_layers
from seerattention.measure.needle import NeedleTask
from seerattention.measure.versions import versions
from seerattention.ops.attention_scores import block_mass
from seerattention.policies import Policy, parse, select

#: Parts of a KV block that have a mean and a radius each.
PARTS = (1, 4)

#: What results of one file share.
SETTINGS = ("window", "windows", "densities")


class ApproximateGate(AttnGate):
    """A gate that scores whole prompts in a way of its own.

    Args:
        gate: Whose design, weights and rotary code it has.
        way: How it scores.
    """

    def __init__(self, gate: AttnGate, way: Way) -> None:
        super().__init__(gate.config, gate.rotary)
        self.load_state_dict(gate.state_dict())
        self.way = way
        # What is asked for its scores is this class.
        self.sub_blocks = None

    def score(self, q: Tensor, k_blocks: Tensor, *, positions: Tensor, valid: Tensor | None = None) -> Tensor:
        """Score a whole prompt's pairs: fp32 ``[1, H, Nq, Nk]``. See `Scorer.score`."""
        return self.way(Layer.of(self, q, k_blocks, positions=positions)).scores[None]


def approximate(gates: Gates, way: Way) -> Gates:
    """Let gates score in a way; they are changed, and returned."""
    for index, gate in list(gates.items()):
        gates.layers[str(index)] = ApproximateGate(gate, way)
    return gates.eval().requires_grad_(False)


def chosen(layer: Layer, policy: Policy, scores: Tensor) -> Tensor:
    """Return the pairs that a policy reads, bool ``[H, Nq, Nk]``."""
    return select(policy, scores[None], rows=layer.rows, block_size=layer.block_size).to_mask()[0]


def ranked(
    layer: Layer, mass: Tensor, named: dict[str, Way], policies: dict[str, Policy]
) -> dict[str, dict[str, Any]]:
    """Return what each way chooses of a layer, beside the exact way.

    Args:
        layer: The layer.
        mass: Its attention in every pair of blocks, ``[H, Nq, Nk]``.
        named: Ways; the first is the exact one.
        policies: How many blocks are read, by density.

    Returns:
        By way the products computed and, by density: ``kept``, the exact way's blocks that it chooses, of
        those that are a choice, ``of`` so many; ``mass`` in all that it reads, and ``free`` without the
        blocks that are read anyway. Rows that read all they see are left out.
    """
    found: dict[str, dict[str, Any]] = {}
    best: dict[str, tuple[Tensor, Tensor]] = {}
    for name, way in named.items():
        scores, products = way(layer)
        found[name] = {"products": products}
        for density, policy in policies.items():
            read = chosen(layer, policy, scores)
            if density not in best:
                choice = (read.sum(-1) < layer.valid.sum(-1))[..., None]
                best[density] = read & choice, choice
            exact, choice = best[density]
            read, free = read & choice, ~layer.always
            found[name][density] = {
                "kept": int((read & exact & free).sum()),
                "of": int((exact & free).sum()),
                "mass": float(mass[read].sum()),
                "free": float(mass[read & free].sum()),
            }
    return found


def left_out(layer: Layer, policies: dict[str, Policy]) -> dict[str, dict[str, float]]:
    """Return which share of the pairs that are a choice bounds rule out, alone and for a whole tile.

    The worst score that is chosen is taken as known, as totals are: no kernel leaves out more.
    """
    scores, found = layer.shares(layer.exact, layer.totals), {}
    for parts in PARTS:
        bound = bounded(layer, parts)
        for density, policy in policies.items():
            read = chosen(layer, policy, scores)
            free = layer.valid & ~layer.always & (read.sum(-1) < layer.valid.sum(-1))[..., None]
            worst = scores.masked_fill(~(read & free), float("inf")).amin(-1, keepdim=True)
            out = (bound < worst) & free
            whole = len(free[0]) // TILE * TILE
            tiles = ((out | ~free)[:, :whole].unflatten(1, (-1, TILE)).all(2)).repeat_interleave(TILE, 1)
            found.setdefault(str(parts), {})[density] = {
                "alone": float(out.sum() / free.sum()),
                "tile": float((tiles & free[:, :whole]).sum() / free[:, :whole].sum()),
            }
    return found


def ranking(args: argparse.Namespace, model: Any, gates: Gates) -> dict[str, Any]:
    """Return what every way chooses of held-out text, over all layers, and what bounds rule out."""
    policies = {f"{x:g}": parse(POLICY.format(x)) for x in args.densities}
    named = {name: way for name, way in ways().items() if not args.ways or name in ("exact", *args.ways)}
    started, done = time.perf_counter(), 0

    def look(call: AttentionCall, gate: AttnGate, scores: Tensor) -> tuple[Any, Any]:
        nonlocal done
        keys = gate.compress(call.k_nope, positions=call.positions)
        layer = Layer.of(gate, call.q_nope, keys, positions=call.positions)
        ours = layer.shares(layer.exact, layer.totals).masked_fill(~layer.valid, float("-inf"))
        torch.testing.assert_close(ours, scores[0], rtol=1e-3, atol=1e-3)
        mass = block_mass(call.q, call.k, gate.block_size, scale=call.scale, softcap=call.softcap)[0]
        found = ranked(layer, mass, named, policies), left_out(layer, policies)
        done += 1
        print(f"{done} layers, {time.perf_counter() - started:.0f} s", flush=True)
        return found

    by_layer = record_layers(model, gates, windows_of(args), look)
    return {
        "ways": of_all([added([one for one, _ in texts]) for texts in by_layer.values()]),
        "bounds": mean([one for texts in by_layer.values() for _, one in texts]),
        "seconds": round(time.perf_counter() - started, 1),
    }


def of_all(layers: list[Any]) -> dict[str, Any]:
    """Add up what `ranked` says of layers, and say what share is ``kept`` in the ``worst`` of them."""
    found = added(layers)
    for name, cells in found.items():
        for density in cells.keys() - {"products"}:
            shares = [one["kept"] / one["of"] for x in layers if (one := x[name][density])["of"]]
            cells[density]["worst"] = round(min(shares, default=1.0), 4)
    return found


def added(parts: list[Any]) -> Any:
    """Add up numbers in dictionaries of one shape, but for ``products``, of which it is the mean."""
    if not isinstance(parts[0], dict):
        return round(sum(parts), 1)
    return {
        key: round(float(np.mean([one[key] for one in parts])), 4)
        if key == "products"
        else added([one[key] for one in parts])
        for key in parts[0]
    }


def mean(parts: list[Any]) -> Any:
    """Return the means of numbers in dictionaries of one shape."""
    if not isinstance(parts[0], dict):
        return float(np.mean(parts))
    return {key: mean([one[key] for one in parts]) for key in parts[0]}


def quality(args: argparse.Namespace, model: Any, tokenizer: Any, save: Callable[[Any], None]) -> None:
    """Measure dense attention and ways, in the order of the command line, and save after each cell."""
    named, windows = ways(), windows_of(args)
    numbers = NeedleTask(tokenizer, np.concatenate(windows))
    documents = [numbers.make(args.window, i) for i in range(args.documents)]
    asked = questions(args, tokenizer, {"niah_single": {}}, args.asked_length) if args.questions else {}
    found = read_json(args.out / "quality.json")["rows"] if (args.out / "quality.json").exists() else {}
    for name in ("dense", *(args.ways or named)):
        dense = name == "dense"
        gates = None if dense else approximate(bundled.named_gates(args.gates).float(), named[name])
        row = found.setdefault(name, {"perplexity": {}, "found": {}})
        for density in ["1"] if dense else [f"{x:g}" for x in args.densities]:
            policy = None if dense else POLICY.format(float(density))
            if density not in row["perplexity"]:
                row["perplexity"][density] = losses(model, gates, policy, windows, documents)
                save(found)
            for task, some in asked.items():
                if density not in (cells := row["found"].setdefault(task, {})):
                    cells[density] = foreseen(model, gates, policy, some)
                    save(found)
        print(name, row["perplexity"], row["found"], flush=True)


def parsed(given: list[str] | None = None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("part", choices=("ranking", "quality"))
    add("--model", default=bundled.BUNDLED, help="hub id or folder (default: %(default)s)")
    add("--gates", default=bundled.BUNDLED, help="folder or hub id (default: %(default)s)")
    add("--heldout", type=Path, nargs="+", default=[], help="books to measure on, the first time")
    add("--out", type=Path, required=True, help="folder for everything")
    add("--window", type=int, default=8192, help="tokens of a held-out window")
    add("--windows", type=int, default=2, help="held-out windows")
    add("--densities", type=float, nargs="+", default=[0.1, 0.05], help="of the blocks")
    add("--ways", nargs="+", choices=[*ways()], metavar="WAY", help=f"of {', '.join(ways())}; default: all")
    add("--documents", type=int, default=0, help="of 8 numbers each, in the bundled teacher's words")
    add("--questions", type=int, default=0, help="for one number, after RULER, for other models")
    add("--asked-length", type=int, default=4096, help="tokens of a question's prompt")
    return parser.parse_args(given)


def main() -> None:
    """Read the command line and run."""
    args = parsed()
    path = args.out / f"{args.part}.json"
    args.out.mkdir(parents=True, exist_ok=True)
    model_name = "teacher" if args.model == bundled.BUNDLED else Path(args.model).name
    told = {"model": model_name, **{name: getattr(args, name) for name in SETTINGS}}
    if args.part == "quality":
        told |= {name: getattr(args, name) for name in ("documents", "questions", "asked_length")}
    if path.exists() and read_json(path)["settings"] != told:
        sys.exit(f"error: {path} is of other settings; give another folder")
    model, tokenizer = bundled.named_model(args.model, dtype="float32", device="cpu")
    about = {"versions": versions("cpu"), "settings": told}
    if args.part == "ranking":
        results = about | ranking(args, model, bundled.named_gates(args.gates).float())
        write_json(path, results)
        print(table([results]))
    else:
        quality(args, model, tokenizer, lambda rows: write_json(path, about | {"rows": rows}))
    print(f"everything is in {args.out}")


if __name__ == "__main__":
    main()
