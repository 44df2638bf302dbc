"""Which gates choose best for single tokens, and whether prefill's can: designs and objectives on one model.

    python -m experiments.decode_gates.run --model MODEL --text BOOKS --heldout BOOKS --out runs/decode_gates
    python -m experiments.decode_gates.run --model MODEL --out runs/decode_gates --only prefill both quest

Every set of gates is taught by `Distiller` on the same windows, in a process of its own, and measured on
held-out text: the share of true attention that single tokens keep at budgets of tokens, chosen as decoding
chooses, and the perplexity of sparse prefill where the gates are taught for it. Stopped at any point, the
same command goes on from there. Results are in OUT/results.json. Text is tokenised once, into OUT/tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.teacher.data import read_books
from seerattention import baselines
from seerattention.files import read_json, write_json, write_whole
from seerattention.gate_config import GateConfig
from seerattention.hosts.transformers import AttentionCall, Gates, intercept, new_gates, save_gates
from seerattention.measure import bundled
from seerattention.measure.compare import measured
from seerattention.measure.versions import versions
from seerattention.ops.attention_scores import attention_scores, by_block
from seerattention.ops.dense_attention import dense_attention
from seerattention.ops.select_decode_blocks.reference import chosen
from seerattention.policies import TokenBudget
from seerattention.scorer import Scorer
from seerattention.train import DistillConfig, Distiller, TextWindows
from seerattention.train.loop import METRICS
from seerattention.train.target import decode_rows

#: Densities of sparse prefill; the first and the own block forced, no dense last rows.
DENSITIES = (0.2, 0.1)
POLICY = "top_k:{:g},sink_blocks=1"

#: Of the rows that teach, every so many are measured.
EVERY = 4


@dataclass(frozen=True)
class Variant:
    """One set of gates to teach.

    Attributes:
        gate: Settings of `new_gates`.
        objective: Name of an objective.
        lr: Peak learning rate.
    """

    gate: dict[str, Any] = field(default_factory=dict)
    objective: str = "sharp_kl"
    lr: float = 3e-3


def decode(k_sub: int | None, **settings: Any) -> dict[str, Any]:
    """Return the design of gates for decoding alone with ``k_sub`` keys per summary."""
    own = {"q_pool": ("avg",), "q_sub_block": 1, "per_kv_head": True}
    return {"phase": "decode", **own, "k_sub_block": k_sub, **settings}


#: The design of the published decode gates, but for ``gate_dim``, which is the head's.
PUBLISHED = {"qk_norm": True, "rope_pairs": "spread", "init": "random"}

VARIANTS = {
    "prefill": Variant(),
    "prefill-k16": Variant({"k_sub_block": 16}),
    "both": Variant({"phase": "both"}),
    "both-k16": Variant({"phase": "both", "k_sub_block": 16}),
    "both-k32": Variant({"phase": "both", "k_sub_block": 32}),
    "decode-k64": Variant(decode(None)),
    "decode-k32": Variant(decode(32)),
    "decode-k16": Variant(decode(16)),
    "decode-k8": Variant(decode(8)),
    "decode-k16-query-heads": Variant(decode(16, per_kv_head=False)),
    "decode-k16-kl": Variant(decode(16), "kl"),
    "decode-k64-kl": Variant(decode(None), "kl"),
    "published": Variant(decode(None, **PUBLISHED), "kl", 1e-3),
    "published-sharp": Variant(decode(None, **PUBLISHED)),
}
#: Ways to choose without gates.
SCORERS = ("oracle_mass", "quest", "meanpool", "streaming")


def main() -> None:
    """Read the command line and run."""
    args = parsed()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        same_settings(args)
        for name in ("text", "heldout"):
            tokens_of(args, name)
        if args.tokens_only:
            return
        if args.one:
            one(args, args.one)
            return
        started = time.perf_counter()
        teach(args)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    results = collected(args)
    write_json(args.out / "results.json", results)
    print(table(results))
    print(f"{time.perf_counter() - started:.0f} s; everything is in {args.out}")


def parsed(given: list[str] | None = None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    parser.add_argument("--model", default=bundled.BUNDLED, help="hub id or folder (default: %(default)s)")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="books to train on, the first time")
    parser.add_argument("--heldout", type=Path, nargs="+", default=[], help="and books to measure on")
    parser.add_argument("--characters", type=int, default=50_000, help="of each book to train on")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--length", type=int, default=8192, help="tokens per step and held-out window")
    parser.add_argument("--windows", type=int, default=8, help="held-out windows, each of another book")
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 512, 1024, 2048], help="in tokens")
    parser.add_argument("--block", type=int, default=64, help="tokens per block")
    parser.add_argument("--only", nargs="+", choices=[*VARIANTS, *SCORERS], help="default: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=1, help="at a time, on one device")
    parser.add_argument("--tokens-only", action="store_true", help="stop once there are tokens")
    parser.add_argument("--one", choices=[*VARIANTS, *SCORERS], help="one of a run's processes")
    return parser.parse_args(given)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what results of one folder share."""
    names = ("characters", "steps", "length", "windows", "budgets", "block", "seed")
    return {"model": Path(args.model).name, **{name: getattr(args, name) for name in names}}


def same_settings(args: argparse.Namespace) -> None:
    """Refuse a folder that holds results of other settings."""
    path, told = args.out / "settings.json", settings(args)
    if path.exists() and read_json(path) != told:
        raise ValueError(f"{args.out} holds a run of other settings, {path}; give another folder")
    write_json(path, told)


def tokens_of(args: argparse.Namespace, name: str) -> np.ndarray:
    """Return the tokens of the text or of the held-out windows, made on the first call."""
    path: Path = args.out / "tokens" / f"{name}.npy"
    if not path.exists():
        if not (sources := getattr(args, name)):
            raise ValueError(f"{args.out} has no tokens yet; give --text and --heldout")
        _, tokenizer = bundled.named_model(args.model, device="cpu")
        end, parts = tokenizer.convert_tokens_to_ids(tokenizer.eos_token), []
        for book in read_books(sources):
            # A token is a few characters: a window of a book that has one.
            cut = book[: args.characters if name == "text" else 16 * args.length]
            ids = np.array([*tokenizer.backend_tokenizer.encode(cut, add_special_tokens=False).ids, end])
            if name == "text":
                parts.append(ids)
            elif len(ids) > args.length and len(parts) < args.windows:
                parts.append(ids[: args.length])
        found = np.concatenate(parts).astype(np.uint16 if max(map(max, parts)) < 2**16 else np.uint32)
        path.parent.mkdir(exist_ok=True)
        write_whole(path, lambda place: np.save(place, found))
        print(f"{name}: {len(found):,} tokens of {len(parts)} books")
    return np.load(path)


def teach(args: argparse.Namespace) -> None:
    """Start a process for everything that has no result yet, a few at a time, and wait."""
    left = [name for name in args.only or (*VARIANTS, *SCORERS) if not result_of(args, name).exists()]
    running: dict[str, subprocess.Popen[bytes]] = {}
    shown, failed = "", []
    (args.out / "logs").mkdir(exist_ok=True)
    try:
        while left or running:
            while left and len(running) < args.processes:
                name = left.pop(0)
                command = [sys.executable, "-m", "experiments.decode_gates.run", *sys.argv[1:], "--one", name]
                with (args.out / "logs" / f"{name}.txt").open("wb") as log:
                    running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            time.sleep(1)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    if process.returncode:
                        failed.append(name)
            said = "; ".join(f"{name} {steps_of(args, name)}" for name in running)
            if said and said != shown and (not shown or not int(time.time()) % 10):
                shown = said
                print(f"{said}; {len(left)} to come", flush=True)
    finally:
        for process in running.values():
            process.terminate()
            process.wait()
    for name in failed:
        lines = (args.out / "logs" / f"{name}.txt").read_text(errors="replace").splitlines()
        print(f"{name} failed:", *lines[-15:], sep="\n")


def steps_of(args: argparse.Namespace, name: str) -> int:
    """Return how many steps gates have been taught."""
    path = args.out / "gates" / name / METRICS
    return len(path.read_text().splitlines()) if path.exists() else 0


def result_of(args: argparse.Namespace, name: str) -> Path:
    """Return the file of one result."""
    return args.out / "results" / f"{name}.json"


def one(args: argparse.Namespace, name: str) -> None:
    """Teach one set of gates, or take a scorer without any, and measure it."""
    torch.set_float32_matmul_precision("high")
    dtype = "bfloat16" if args.device.startswith("cuda") else "float32"
    model, _ = bundled.named_model(args.model, dtype=dtype, device=args.device)
    windows = list(tokens_of(args, "heldout").astype(np.int64).reshape(-1, args.length))
    started, row = time.perf_counter(), {"name": name}
    if name in SCORERS:
        scorer = baselines.create(name, block_size=[args.block, args.block])
        layers: Mapping[int, Scorer] = dict.fromkeys(range(model.config.num_hidden_layers), scorer)
        if name == SCORERS[0]:
            row["dense"] = measured(model, None, windows=windows).perplexity
    else:
        gates = taught(args, name, model)
        # As users load them.
        gates = gates.to(model.dtype).requires_grad_(False)
        layers = dict(gates.items())
        row |= {"gate": gates.config.to_dict(), "read": read_share(gates.config)}
        row["taught"] = last_step(args, name)
        if "prefill" in gates.config.phases:
            row["perplexity"] = {
                str(density): measured(model, gates, POLICY.format(density), windows=windows).perplexity
                for density in DENSITIES
            }
    row["recall"] = recall(model, layers, windows, args.budgets, args.block)
    row["seconds"] = round(time.perf_counter() - started, 1)
    result_of(args, name).parent.mkdir(exist_ok=True)
    write_json(result_of(args, name), row)


def taught(args: argparse.Namespace, name: str, model: Any) -> Gates:
    """Teach gates to the end, from their last checkpoint on."""
    variant, out = VARIANTS[name], args.out / "gates" / name
    torch.manual_seed(args.seed)
    design = {"gate_dim": GateConfig(1, 1, head_dim(model)).head_dim} if name.startswith("published") else {}
    # Fewer tokens per block than the designs are made for: as many summaries per block.
    subs = {key: variant.gate.get(key, 4) for key in ("q_sub_block", "k_sub_block")}
    subs = {key: sub if sub is None or sub < args.block else None for key, sub in subs.items()}
    gates = new_gates(model, **{**variant.gate, **design, **subs, "block_size": args.block})
    text = TextWindows(tokens_of(args, "text"), args.length, 1, args.seed)
    config = DistillConfig(steps=args.steps, lr=variant.lr, objective=variant.objective)
    # Without gaps in positions: all is measured at this length.
    for step in Distiller(model, gates, text, config, out=out, reach=args.length).run():
        recalls = [x for x in (step.recall, step.decode_recall) if x is not None]
        print(
            step.step, f"{step.loss:.4f}", *(f"{x:.4f}" for x in recalls), f"{step.seconds:.2f}", flush=True
        )
    save_gates(gates, out / "gates")
    return gates


def head_dim(model: Any) -> int:
    """Return the dimension of a model's heads."""
    c = model.config
    return getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads


def last_step(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return what the last step of teaching said, with the median time of all."""
    rows = [json.loads(line) for line in (args.out / "gates" / name / METRICS).read_text().splitlines()]
    keys = ("step", "loss", "recall", "decode_recall")
    times = sorted(row["seconds"] for row in rows)
    return {**{key: rows[-1][key] for key in keys}, "seconds_per_step": round(times[len(times) // 2], 3)}


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


def collected(args: argparse.Namespace) -> dict[str, Any]:
    """Return all results there are."""
    names = (*SCORERS, *VARIANTS)
    rows = [read_json(result_of(args, name)) for name in names if result_of(args, name).exists()]
    variants = {name: {"objective": v.objective, "lr": v.lr} for name, v in VARIANTS.items()}
    return {"versions": versions(), "settings": settings(args), "variants": variants, "rows": rows}


def table(results: dict[str, Any]) -> str:
    """Return one line per way of choosing: what it reads, what is kept by budget, sparse prefill."""
    budgets = list(map(str, results["settings"]["budgets"]))
    dense = next((row["dense"] for row in results["rows"] if "dense" in row), None)
    titles = ["reads", *budgets, *(f"ppl {density:.0%}" for density in DENSITIES)]
    lines = [f"{'attention kept by token budget':30}" + "".join(f"{title:>9}" for title in titles)]
    for row in results["rows"]:
        cells = [f"{row['read']:.1%}" if "read" in row else ""]
        cells += [f"{row['recall'][budget]:.4f}" for budget in budgets]
        cells += [f"{value:.3f}" for value in row.get("perplexity", {}).values()]
        lines.append(f"{row['name']:30}" + "".join(f"{cell:>9}" for cell in cells))
    if dense is not None:
        lines.append(f"dense perplexity {dense:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
