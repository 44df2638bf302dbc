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
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.decoding.table import rise
from experiments.teacher.data import read_books
from seerattention import attach, baselines, detach
from seerattention.evals import tasks
from seerattention.evals.tasks import Source
from seerattention.files import read_json, write_json, write_whole
from seerattention.gate_config import GateConfig
from seerattention.hosts.transformers import AttentionCall, Gates, intercept, new_gates, save_gates
from seerattention.measure import bundled
from seerattention.measure.compare import measured
from seerattention.measure.decoding import continued
from seerattention.measure.versions import versions
from seerattention.ops.attention_scores import attention_scores, by_block
from seerattention.ops.dense_attention import dense_attention
from seerattention.ops.select_decode_blocks.reference import chosen
from seerattention.policies import TokenBudget
from seerattention.scorer import Scorer
from seerattention.train import DistillConfig, Distiller, TextWindows
from seerattention.train.loop import METRICS
from seerattention.train.mixture import Mixture
from seerattention.train.target import decode_rows

#: Densities of sparse prefill; the first and the own block forced, no dense last rows.
DENSITIES = (0.2, 0.1)
POLICY = "top_k:{:g},sink_blocks=1"

#: Of the rows that teach, every so many are measured.
EVERY = 4

#: Budgets in tokens at which the second half of windows is decoded, the first of them for questions too.
DECODED = (512, 2048)
#: Tasks whose questions are asked at half a window, and how many of each; tokens decoded before the answer.
TASKS: dict[str, dict[str, Any]] = {"niah_single": {}, "niah_multikey": {"keys": 4}}
QUESTIONS, ASKING = 48, 63

#: Prompts with the tokens of their answers.
Asked = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Variant:
    """One set of gates to teach.

    Attributes:
        gate: Settings of `new_gates`.
        objective: Name of an objective; default the phase's.
        target: What is learned of a block; default the phase's.
        lr: Peak learning rate.
        retrieval: Share of sequences that ask for what they state.
        repeats: Share in which passages return.
        taught: Whether they learn at all.
    """

    gate: dict[str, Any] = field(default_factory=dict)
    objective: str = ""
    target: str = ""
    lr: float = 3e-3
    retrieval: float = 0.25
    repeats: float = 0.1
    taught: bool = True


def decode(k_sub: int | None, **settings: Any) -> dict[str, Any]:
    """Return the design of gates for decoding alone with ``k_sub`` keys per summary."""
    pool = {"k_pool": ("avg",)} if k_sub == 1 else {}
    return {"phase": "decode", "k_sub_block": k_sub, **pool, **settings}


#: The design of the published decode gates, but for ``gate_dim``, which is the head's.
PUBLISHED = {"qk_norm": True, "rope_pairs": "spread", "init": "random"}

VARIANTS = {
    "default": Variant({"phase": "decode"}),
    "not taught": Variant({"phase": "decode"}, taught=False),
    "k1, 32": Variant(decode(1, gate_dim=32)),
    "k2, 16": Variant(decode(2, gate_dim=16)),
    "k2, 32": Variant(decode(2, gate_dim=32)),
    "k4, 32": Variant(decode(4, gate_dim=32)),
    "k8, 32": Variant(decode(8, gate_dim=32)),
    "k8": Variant(decode(8)),
    "k64": Variant(decode(None)),
    "books alone": Variant({"phase": "decode"}, retrieval=0.0, repeats=0.0),
    "largest weight": Variant({"phase": "decode"}, target="max"),
    "all blocks": Variant({"phase": "decode"}, "kl"),
    "k64, as published": Variant(decode(None), "kl", "max"),
    "published": Variant(decode(None, **PUBLISHED), "kl", "max", 1e-3),
    "prefill": Variant(),
    "both": Variant({"phase": "both"}),
}
#: Ways to choose without gates.
SCORERS = ("dense", "oracle_mass", "quest", "meanpool", "streaming")


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
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="of each task")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=1, help="at a time, on one device")
    parser.add_argument("--tokens-only", action="store_true", help="stop once there are tokens")
    parser.add_argument("--one", choices=[*VARIANTS, *SCORERS], help="one of a run's processes")
    return parser.parse_args(given)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what results of one folder share."""
    names = ("characters", "steps", "length", "windows", "budgets", "block", "questions", "seed")
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
    model, tokenizer = bundled.named_model(args.model, dtype=dtype, device=args.device)
    samples = questions(args, tokenizer)
    windows = list(tokens_of(args, "heldout").astype(np.int64).reshape(-1, args.length))
    started, row = time.perf_counter(), {"name": name}
    if name in SCORERS:
        chooses = None if name == "dense" else baselines.create(name, block_size=[args.block, args.block])
        layers = {} if chooses is None else dict.fromkeys(range(model.config.num_hidden_layers), chooses)
    else:
        gates = taught(args, name, model, tokenizer)
        # As users load them.
        chooses = gates = gates.to(model.dtype).requires_grad_(False)
        layers: Mapping[int, Scorer] = dict(gates.items())
        row |= {"gate": gates.config.to_dict(), "read": read_share(gates.config)}
        row |= {"taught": last_step(args, name)} if VARIANTS[name].taught else {}
        if "prefill" in gates.config.phases:
            row["perplexity"] = {
                str(density): measured(model, gates, POLICY.format(density), windows=windows).perplexity
                for density in DENSITIES
            }
    if layers:
        row["recall"] = recall(model, layers, windows, args.budgets, args.block)
    row |= decoded(model, chooses, windows, samples)
    row["seconds"] = round(time.perf_counter() - started, 1)
    result_of(args, name).parent.mkdir(exist_ok=True)
    write_json(result_of(args, name), row)


def taught(args: argparse.Namespace, name: str, model: Any, tokenizer: Any) -> Gates:
    """Teach gates to the end, from their last checkpoint on."""
    variant, out = VARIANTS[name], args.out / "gates" / name
    torch.manual_seed(args.seed)
    design = {"gate_dim": GateConfig(1, 1, head_dim(model)).head_dim} if name.startswith("published") else {}
    # Fewer tokens per block than the designs are made for: as many summaries per block.
    gates = new_gates(model, **{**variant.gate, **design, "block_size": args.block})
    if not variant.taught:
        return gates
    text = TextWindows(tokens_of(args, "text"), args.length, 1, args.seed)
    text = Mixture(text, tokenizer, variant.retrieval, variant.repeats, args.seed)
    config = DistillConfig(
        steps=args.steps, lr=variant.lr, objective=variant.objective, target=variant.target
    )
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


def questions(args: argparse.Namespace, tokenizer: Any) -> dict[str, Asked]:
    """Return prompts of half a window by task, each with the tokens of its answer."""
    source = Source(tokenizer, [tokens_of(args, "heldout").astype(np.int64)], bool(tokenizer.chat_template))
    found: dict[str, Asked] = {}
    for name, options in TASKS.items():
        task = tasks.create(name, **options)
        made = [task.make(source, args.length // 2, seed) for seed in range(args.questions)]
        found[name] = [(one.prompt, source.encode(" " + one.expected[0])) for one in made]
    return found


@torch.inference_mode()
def decoded(
    model: Any,
    scorer: Any,
    windows: list[np.ndarray],
    samples: dict[str, Asked],
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


def foreseen(model: Any, some: Asked) -> float:
    """Return the share of answers every token of which is the most likely one, the question decoded too."""
    right = 0
    for prompt, answer in some:
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


def collected(args: argparse.Namespace) -> dict[str, Any]:
    """Return all results there are."""
    names = (*SCORERS, *VARIANTS)
    rows = [read_json(result_of(args, name)) for name in names if result_of(args, name).exists()]
    variants = {name: asdict(variant) for name, variant in VARIANTS.items()}
    return {"versions": versions(), "settings": settings(args), "variants": variants, "rows": rows}


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
    more, half = rise({"losses": losses}, {"losses": dense})
    return f"{more:+.2%} ± {half:.2%}"


if __name__ == "__main__":
    main()
