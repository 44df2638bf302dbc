"""Which gates choose best for single tokens, and whether prefill's can: designs and objectives on one model.

    python -m experiments.decode_gates.run --model MODEL --text BOOKS --heldout BOOKS --out runs/decode_gates
    python -m experiments.decode_gates.run --model MODEL --out runs/decode_gates --only prefill both quest

Every set of gates is taught by `Distiller` on the same sequences, in a process of its own, and measured on
held-out text, every token of a window's second half decoded: perplexity at budgets of tokens, the share of
true attention that is kept, and numbers that are asked for behind a text, after RULER; and the perplexity of
sparse prefill where the gates are taught for it. Stopped at any point, the same command goes on from there.
Results are in OUT/results.json. Text is tokenised once, into OUT/tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.variants import POLICY, Experiment, Measure, Question, Variant, questions, windows_of
from seerattention import attach, detach
from seerattention.gate_config import GateConfig
from seerattention.hosts.transformers import AttentionCall, Gates, intercept
from seerattention.measure.compare import measured
from seerattention.measure.decoding import continued
from seerattention.measure.intervals import rise
from seerattention.ops.attention_scores import attention_scores, by_block
from seerattention.ops.dense_attention import dense_attention
from seerattention.ops.select_decode_blocks.reference import chosen
from seerattention.policies import TokenBudget
from seerattention.scorer import Scorer
from seerattention.train.target import decode_rows

#: Densities of sparse prefill.
DENSITIES = (0.2, 0.1)

#: Of the rows that teach, every so many are measured.
EVERY = 4

#: Budgets in tokens at which the second half of windows is decoded, the first of them for questions too.
DECODED = (512, 2048)
#: Tasks whose questions are asked at half a window, and how many of each; tokens decoded before the answer.
TASKS: dict[str, dict[str, Any]] = {"niah_single": {}, "niah_multikey": {"keys": 4}}
QUESTIONS, ASKING = 48, 63

#: A variant with the rate that decoding's are taught at.
Taught = partial(Variant, lr=3e-3)


def decode(k_sub: int | None, **settings: Any) -> dict[str, Any]:
    """Return the design of gates for decoding alone with ``k_sub`` keys per summary."""
    pool = {"k_pool": ("avg",)} if k_sub == 1 else {}
    return {"phase": "decode", "k_sub_block": k_sub, **pool, **settings}


#: The design of the published decode gates, but for ``gate_dim``, which is the head's.
PUBLISHED = {"qk_norm": True, "rope_pairs": "spread", "init": "random"}

VARIANTS = {
    "default": Taught({"phase": "decode"}),
    "not taught": Taught({"phase": "decode"}, taught=False),
    "k1, 32": Taught(decode(1, gate_dim=32)),
    "k2, 16": Taught(decode(2, gate_dim=16)),
    "k2, 32": Taught(decode(2, gate_dim=32)),
    "k4, 32": Taught(decode(4, gate_dim=32)),
    "k8, 32": Taught(decode(8, gate_dim=32)),
    "k8": Taught(decode(8)),
    "k64": Taught(decode(None)),
    "books alone": Taught({"phase": "decode"}, retrieval=0.0, repeats=0.0),
    "largest weight": Taught({"phase": "decode"}, target="max"),
    "all blocks": Taught({"phase": "decode"}, "kl"),
    "k64, as published": Taught(decode(None), "kl", "max"),
    "a third of the rate": Taught({"phase": "decode"}, lr=1e-3),
    "published": Taught(decode(None, **PUBLISHED), "kl", "max", lr=1e-3),
    "prefill": Taught(),
    "both": Taught({"phase": "both"}),
}
#: Ways to choose without gates.
SCORERS = ("dense", "oracle_mass", "quest", "meanpool", "streaming")


def main() -> None:
    """Read the command line and run."""
    EXPERIMENT.main(parsed())


def parsed(given: list[str] | None = None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = EXPERIMENT.parser(__doc__)
    parser.add_argument("--length", type=int, default=8192, help="tokens per step and held-out window")
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 512, 1024, 2048], help="in tokens")
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="of each task")
    args = parser.parse_args(given)
    args.window = args.length
    return args


def prepared(args: argparse.Namespace, model: Any, tokenizer: Any) -> Measure:
    """Return what measures gates or a scorer."""
    windows, samples = windows_of(args), questions(args, tokenizer, TASKS, args.length // 2)

    def measure(scorer: Gates | Scorer | None) -> dict[str, Any]:
        row: dict[str, Any] = {}
        layers: Mapping[int, Scorer] = {}
        if isinstance(scorer, Gates):
            layers = dict(scorer.items())
            row["read"] = read_share(scorer.config)
            if "prefill" in scorer.config.phases:
                row["perplexity"] = {
                    str(density): measured(model, scorer, POLICY.format(density), windows=windows).perplexity
                    for density in DENSITIES
                }
        elif scorer is not None:
            layers = dict.fromkeys(range(model.config.num_hidden_layers), scorer)
        if layers:
            row["recall"] = recall(model, layers, windows, args.budgets, args.block)
        return row | decoded(model, scorer, windows, samples)

    return measure


def read_share(c: GateConfig) -> float:
    """Return what choosing reads per step, the key summaries, as a share of the cached keys' bytes."""
    heads = c.num_kv_heads if c.q_proj else c.num_heads
    return heads * c.dim / (c.num_kv_heads * c.head_dim * c.k_sub)


@torch.inference_mode()
def recall(
    model: Any, layers: Mapping[int, Scorer], windows: list[np.ndarray], budgets: list[int], block: int
) -> dict[str, float]:
    """Return the share of true attention in what single tokens choose, by budget.

    The mean over tokens, query heads, layers and windows; every KV head has one selection, sinks included.
    """
    policies = {str(budget): TokenBudget(budget, sink_blocks=1) for budget in budgets}
    found: dict[str, list[Tensor]] = {budget: [] for budget in policies}

    def look(call: AttentionCall) -> Tensor:
        scorer, length, heads = layers[call.layer], call.q.shape[2], call.k.shape[1]
        rows = decode_rows(length, call.q.device)[::EVERY]
        q = call.q[:, :, rows]
        logits = attention_scores(q, call.k, rows, scale=call.scale, softcap=call.softcap)
        mass = by_block(logits.softmax(-1), block).sum(-1)
        scores = mass.log() if is_oracle(scorer) else token_scores(scorer, call, rows)
        for budget, policy in policies.items():
            mask = chosen(policy, scores, rows[None], block, heads)
            kept = mass * mask.repeat_interleave(mass.shape[1] // heads, 1)
            found[budget].append(kept.sum(-1).mean())
        return dense_attention(call.q, call.k, call.v, scale=call.scale, softcap=call.softcap)

    for window in windows:
        with intercept(model, look):
            model.get_decoder()(torch.from_numpy(window)[None].to(model.device), use_cache=False)
    return {budget: round(float(torch.stack(parts).mean()), 5) for budget, parts in found.items()}


@torch.inference_mode()
def decoded(
    model: Any,
    scorer: Any,
    windows: list[np.ndarray],
    samples: dict[str, list[Question]],
) -> dict[str, Any]:
    """Return each window's mean loss by budget, and the share of answers whose every token is foreseen."""
    found: dict[str, Any] = {"losses": {}, "found": {}}
    for budget in DECODED if scorer is not None else (0,):
        if scorer is not None:
            policy = TokenBudget(budget, sink_blocks=1)
            attach(model, scorer, prefill="dense", decode=policy, min_tokens=0)
        try:
            text = np.stack(windows)
            losses = continued(model, text, text.shape[1] // 2, step=ASKING).losses
            found["losses"][str(budget)] = losses.double().mean(1).tolist()
            if budget in (0, DECODED[0]):
                found["found"] = {name: foreseen(model, some) for name, some in samples.items()}
        finally:
            if scorer is not None:
                detach(model)
    return found


def foreseen(model: Any, some: list[Question]) -> float:
    """Return the share of answers every token of which is the most likely one, the question decoded too."""
    right = 0
    for prompt, answer, _ in some:
        tokens = np.concatenate([prompt, answer])[None]
        said = continued(model, tokens, len(prompt) - ASKING, step=ASKING).predicted[0, -len(answer) :]
        right += bool((said.cpu().numpy() == answer).all())
    return right / len(some)


def is_oracle(scorer: Scorer) -> bool:
    """Whether a scorer ranks blocks by their true attention, which is measured here anyway."""
    return getattr(scorer, "pool", "") == "sum"


def token_scores(scorer: Scorer, call: AttentionCall, rows: Tensor) -> Tensor:
    """Return a scorer's scores of single tokens, fp32 ``[B, H, R, N]``."""
    single = scorer.per_token()
    q, k = (call.q, call.k) if scorer.after_rope else (call.q_nope, call.k_nope)
    blocks = -(-call.k.shape[2] // single.block_size[1])
    valid = torch.ones(len(rows), blocks, dtype=torch.bool, device=rows.device)
    keys = single.compress(k, positions=call.positions)
    return single.score(q[:, :, rows], keys, positions=rows, valid=valid)


def table(results: dict[str, Any]) -> str:
    """Return one line per way of choosing: what it reads, what it loses, finds and keeps; sparse prefill."""
    budgets = list(map(str, results["settings"]["budgets"]))
    rows = {row["name"]: row for row in results["rows"]}
    dense = next(iter(rows["dense"]["losses"].values())) if "dense" in rows else None
    titles = ["reads", *(f"ppl {budget}" for budget in DECODED), *TASKS, *budgets]
    titles += [f"sparse {density:.0%}" for density in DENSITIES]
    lines = [f"{'chosen by':20}" + "".join(f"{title[:12]:>13}" for title in titles)]
    for name, row in rows.items():
        cells = [f"{row['read']:.1%}" if "read" in row else ""]
        for budget in DECODED:
            losses = row["losses"].get(str(budget))
            cells.append(_rise(losses, dense) if losses and dense else "")
        cells += [f"{row['found'][task]:.0%}" for task in TASKS]
        cells += [f"{row['recall'][budget]:.4f}" if "recall" in row else "" for budget in budgets]
        cells += [f"{value:.3f}" for value in row.get("perplexity", {}).values()]
        lines.append(f"{name:20}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)


def _rise(losses: list[float], dense: list[float]) -> str:
    more, half = rise(losses, dense)
    return f"{more:+.2%} ± {half:.2%}"


EXPERIMENT = Experiment("experiments.decode_gates.run", VARIANTS, SCORERS, ("budgets",), prepared, table)


if __name__ == "__main__":
    main()
