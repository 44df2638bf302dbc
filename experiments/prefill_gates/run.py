"""Which gates choose best in prefill: designs, targets and objectives on one model, beside other scorers.

    python -m experiments.prefill_gates.run --model MODEL --text BOOKS --heldout BOOKS --out runs/prefill
    python -m experiments.prefill_gates.run --model MODEL --out runs/prefill --only default --seeds 3

Every set of gates is taught by `Distiller` on the same sequences, in a process of its own, and measured as
the scorers are that need no training: the perplexity of held-out text; numbers that are asked for behind a
text, after RULER, and whether sparse prefill foresees every token of the answer; and what choosing costs.
Of further seeds, results are called NAME-seedK. Stopped at any point, the same command goes on from there.
Results are in OUT/results.json. Text is tokenised once, into OUT/tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from experiments.prefill_gates.table import table
from experiments.variants import (
    POLICY,
    Experiment,
    Measure,
    Question,
    Variant,
    cost,
    questions,
    tokens_of,
    windows_of,
)
from seerattention.baselines.flexprefill import FlexPrefill
from seerattention.baselines.xattention import XAttention
from seerattention.calibration.fit import NEAREST, Target
from seerattention.calibration.search import calibrate
from seerattention.cli.calibrate import REPEATS, RETRIEVAL
from seerattention.gate_config import GateConfig
from seerattention.hosts.transformers import Gates, logits_of
from seerattention.hosts.transformers.family import full_attention_layers
from seerattention.measure.compare import attached, measured
from seerattention.measure.needle import NeedleDocument, NeedleTask
from seerattention.measure.perplexity import hidden_states
from seerattention.policies import Policy, TopP, parse
from seerattention.rows import num_blocks
from seerattention.scorer import Scorer
from seerattention.train import TextWindows
from seerattention.train.mixture import mixed

#: Tasks whose questions are asked at the first length.
TASKS: dict[str, dict[str, Any]] = {
    "niah_single": {},
    "niah_multivalue": {"values": 2},
}

#: Methods that take the best blocks which hold a share of a row's attention, by their own account.
BY_SHARE = (XAttention, FlexPrefill)

#: Windows that a method's own way to spend blocks is fitted on, and how often its value is halved.
FITTED, HALVINGS = 4, 12

#: Ways to spend blocks, by length and by the density they are to read.
Policies = Mapping[int, Mapping[str, Policy | str | None]]

#: What the model's shape says, or the run.
_GIVEN = ("num_heads", "num_kv_heads", "head_dim", "block_size", "gate_dim", "rope_theta")

#: The design of the published gates, but for ``gate_dim``, which is the head's.
PUBLISHED = {
    name: value
    for name, value in GateConfig.published(num_heads=1, num_kv_heads=1, head_dim=64).to_dict().items()
    if name not in _GIVEN
}


def sub_blocks(queries: int, keys: int) -> dict[str, Any]:
    """Return the design with so many queries and keys per summary."""
    return {"q_sub_block": queries, "k_sub_block": keys}


#: Of heads of 64: three quarters.
WIDE = {"gate_dim": 48}

VARIANTS = {
    "default": Variant(),
    "mass and maximum": Variant(target="both"),
    "half of the sequences ask": Variant(retrieval=0.5),
    "for 500 steps": Variant(steps=2.5),
    "for two layers": Variant(layers=2),
    "for four layers": Variant(layers=4),
    "8x4": Variant(sub_blocks(8, 4)),
    "16 numbers": Variant({"gate_dim": 16}),
    "wide": Variant(WIDE),
    "wide, not taught": Variant(WIDE, taught=False),
    "wide, largest weight": Variant(WIDE, target="max"),
    "wide, all blocks": Variant(WIDE, objective="kl"),
    "wide, largest product": Variant({**WIDE, "shares": False}),
    "wide, 8x8": Variant({**WIDE, **sub_blocks(8, 8)}),
    "wide, 8x4": Variant({**WIDE, **sub_blocks(8, 4)}),
    "wide, 2x2": Variant({**WIDE, **sub_blocks(2, 2)}),
    "wide, per KV head": Variant({**WIDE, "per_kv_head": True}),
    "wide, books alone": Variant(WIDE, retrieval=0.0, repeats=0.0),
    "wide, three times the rate": Variant(WIDE, lr=3e-3),
    "former default": Variant({**WIDE, "shares": False}, "sharp_kl", "max", 3e-3),
    "published": Variant(PUBLISHED, "kl", "max", 1e-3),
}
#: Ways to choose without gates.
SCORERS = (
    "dense", "oracle_mass", "oracle", "xattention", "quest", "meanpool", "minference", "flexprefill",
    "streaming",
)  # fmt: skip


def main() -> None:
    """Read the command line and run."""
    EXPERIMENT.main(parsed())


def parsed(given: list[str] | None = None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = EXPERIMENT.parser(__doc__)
    add = parser.add_argument
    add("--length", type=int, default=8192, help="tokens per step")
    add("--eval-lengths", type=int, nargs="+", default=[4096, 8192], help="of held-out windows, in tokens")
    add("--densities", type=float, nargs="+", default=[0.2, 0.1, 0.05], help="of the blocks")
    add("--asked", type=float, nargs="+", default=[0.2, 0.1], help="densities at which questions are asked")
    add("--questions", type=int, default=100, help="of each task, behind the first length; 0 for no task")
    add(
        "--documents",
        type=int,
        default=0,
        help="of 8 numbers each in the bundled teacher's words, at every length; other models know no such",
    )
    args = parser.parse_args(given)
    args.window = max(args.eval_lengths)
    return args


def prepared(args: argparse.Namespace, model: Any, tokenizer: Any) -> Measure:
    """Return what measures gates or a scorer."""
    windows = windows_of(args)
    samples = questions(args, tokenizer, TASKS, args.eval_lengths[0]) if args.questions else {}
    numbers = NeedleTask(tokenizer, np.concatenate(windows)) if args.documents else None
    hidden = {n: [numbers.make(n, i) for i in range(args.documents)] for n in args.eval_lengths if numbers}

    def found(scorer: Gates | Scorer | None, policies: Policies) -> dict[str, Any]:
        return {
            "perplexity": {
                str(length): {
                    density: losses(model, scorer, policy, in_pieces(windows, length), hidden.get(length, ()))
                    for density, policy in named.items()
                }
                for length, named in policies.items()
            },
            "found": {
                task: {
                    density: foreseen(model, scorer, policy, some)
                    for density, policy in policies[args.eval_lengths[0]].items()
                    if density == "1" or float(density) in args.asked
                }
                for task, some in samples.items()
            },
        }

    def measure(scorer: Gates | Scorer | None) -> dict[str, Any]:
        row: dict[str, Any] = {}
        if isinstance(scorer, Gates):
            row["cost"] = cost(scorer.config) * len(scorer.layers) / len(full_attention_layers(model))
        if scorer is None:
            return row | found(scorer, {length: {"1": None} for length in args.eval_lengths})
        rows = {f"{density:g}": POLICY.format(density) for density in args.densities}
        row |= found(scorer, dict.fromkeys(args.eval_lengths, rows))
        own: dict[int, dict[str, Policy]] = {}
        for length in args.eval_lengths:
            read = {at: cell["density"] for at, cell in row["perplexity"][str(length)].items()}
            windows = TextWindows(tokens_of(args, "text"), length, FITTED, args.seed)(0)
            own[length] = own_ways(model, tokenizer, scorer, windows, read)
        if not any(own.values()):
            return row
        way = "calibrated" if isinstance(scorer, Gates) else "by share"
        return row | {"own": {"way": way, **found(scorer, own)}}

    return measure


def own_ways(
    model: Any, tokenizer: Any, scorer: Gates | Scorer, windows: np.ndarray, densities: Mapping[str, float]
) -> dict[str, Policy]:
    """Return a method's own ways to spend blocks, fitted to read as many of some windows.

    Gates have thresholds per head, as `seerattention calibrate` fits them by default; XAttention and
    FlexPrefill cover a share of the attention that they foresee. None of others, and where hardly more can
    be read than what is read anyway.
    """
    length = windows.shape[1]
    block = scorer.config.block_size if isinstance(scorer, Gates) else scorer.block_size[1]
    least = NEAREST * parse(POLICY.format(1)).always_density(num_blocks(length, block))
    asked = {at: density for at, density in densities.items() if density > least}
    if isinstance(scorer, Gates):
        mix = partial(mixed, tokenizer=tokenizer, retrieval=RETRIEVAL, repeats=REPEATS)
        given = {"length": length, "windows": len(windows), "mix": mix}
        text = windows.flatten()
        return {at: calibrate(model, scorer, text, Target(x), **given).policy for at, x in asked.items()}
    if not isinstance(scorer, BY_SHARE):
        return {}
    return {at: covering(model, scorer, list(windows), density) for at, density in asked.items()}


def covering(model: Any, scorer: Scorer, windows: list[np.ndarray], density: float) -> TopP:
    """Return the share of attention to cover for a density to be read, found by halving."""
    low, high, way = 0.0, 1.0, TopP(1.0, sink_blocks=1)
    for _ in range(HALVINGS):
        way = TopP((low + high) / 2, sink_blocks=1)
        if losses(model, scorer, way, windows)["density"] < density:
            low = way.mass
        else:
            high = way.mass
    return way


def in_pieces(windows: list[np.ndarray], length: int) -> list[np.ndarray]:
    """Cut windows into as many pieces of a length as they hold."""
    starts = range(0, len(windows[0]) - length + 1, length)
    return [window[start : start + length] for window in windows for start in starts]


def losses(
    model: Any,
    scorer: Gates | Scorer | None,
    policy: Policy | str | None,
    windows: list[np.ndarray],
    documents: Sequence[NeedleDocument] = (),
) -> dict[str, Any]:
    """Return each window's mean loss, in nats, the share of the blocks read, and of the numbers found."""
    row = measured(model, scorer, policy, windows=windows, documents=documents)
    found = {"density": row.density, "losses": [float(loss.mean()) for loss in row.losses]}
    return found | ({} if row.needles is None else {"needles": row.needles})


@torch.inference_mode()
def foreseen(
    model: Any, scorer: Gates | Scorer | None, policy: Policy | str | None, some: list[Question]
) -> dict[str, float]:
    """Return the share of answers whose every token is the most likely one, and their mean log-likelihood.

    Of the tokens that count, prompt and answer read in one call.
    """
    right, likelihoods = 0, []
    with attached(model, scorer, policy):
        for prompt, answer, counts in some:
            hidden = hidden_states(model, np.concatenate([prompt, answer]))[len(prompt) - 1 : -1]
            own = torch.from_numpy(counts).to(hidden.device)
            logits = logits_of(model, hidden[own]).float()
            targets = torch.from_numpy(answer[counts]).to(hidden.device)
            right += bool((logits.argmax(-1) == targets).all())
            likelihoods.append(float(logits.log_softmax(-1).gather(1, targets[:, None]).mean()))
    return {"share": right / len(some), "likelihood": float(np.mean(likelihoods))}


EXPERIMENT = Experiment(
    "experiments.prefill_gates.run",
    VARIANTS,
    SCORERS,
    ("eval_lengths", "densities", "asked", "documents"),
    prepared,
    table,
)


if __name__ == "__main__":
    main()
