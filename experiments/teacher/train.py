"""Train the bundled teacher, or one of another recipe, on one GPU: from books to what transformers loads.

    python -m experiments.teacher.train --books books/ --heldout heldout/ --out runs/teacher

Stopped at any point (or by --max-seconds), the same command continues where it was, exactly.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from experiments.teacher.data import Mixture, read_books, tokenise
from experiments.teacher.evaluate import evaluate
from experiments.teacher.export import export
from experiments.teacher.tokenizer import train_tokenizer
from seerattention.measure.needle import NeedleDocument

HERE = Path(__file__).parent


def build(recipe: dict[str, Any], vocab_size: int, end: int) -> PreTrainedModel:
    """Return the untrained model, fp32."""
    settings = dict(recipe["model"])
    theta = settings.pop("rope_theta")
    config = AutoConfig.for_model(
        vocab_size=vocab_size,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
        initializer_range=0.02,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        **settings,
    )
    torch.manual_seed(recipe["seed"])
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


def hidden_states(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Run the decoder layers without building any mask: attention stays on the fused causal kernels."""
    hidden = model.model.embed_tokens(tokens)
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    rotary = model.model.rotary_emb(hidden, positions)
    for layer in model.model.layers:
        hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
    return model.model.norm(hidden)


def token_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of next tokens."""
    return F.cross_entropy((hidden @ weight.T).float(), targets)


def fastest_attention(length: int, recipe: dict[str, Any], device: torch.device) -> list[SDPBackend]:
    """Time the fused causal kernels forward and backward at this length and return the better order."""
    orders = [[SDPBackend.FLASH_ATTENTION], [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]]
    if device.type != "cuda":
        return [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
    m = recipe["model"]
    shape = [
        (4, m[h], length, m["head_dim"]) for h in ("num_attention_heads",) + ("num_key_value_heads",) * 2
    ]
    q, k, v = (torch.randn(s, device=device, dtype=torch.bfloat16, requires_grad=True) for s in shape)
    times = []
    for order in orders:
        with sdpa_kernel(order, set_priority=True):
            for i in range(6):
                if i == 2:
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).sum().backward()
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    print(
        f"attention at {length}: "
        + ", ".join(f"{o[0].name} {t / 4 * 1e3:.2f} ms" for o, t in zip(orders, times, strict=True))
    )
    return orders[times.index(min(times))]


def learning_rate(stage: dict[str, Any], optimizer: dict[str, Any], step: int, steps: int) -> float:
    """Warm up linearly, then follow a cosine to the floor, inside one stage."""
    warmup = max(1, round(optimizer["warmup"] * steps))
    if step < warmup:
        return stage["lr"] * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    low = optimizer["floor"]
    return stage["lr"] * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.inference_mode()
def needles_found(model: PreTrainedModel, documents: list[NeedleDocument]) -> float:
    """Return the share of needles found in training-like documents, all run as one batch."""
    tokens = torch.from_numpy(np.stack([d.tokens for d in documents])).to(model.device)
    with torch.compiler.set_stance("force_eager"), torch.autocast(model.device.type, torch.bfloat16):
        hidden = hidden_states(model, tokens)
        found = 0
        for document, states in zip(documents, hidden, strict=True):
            where = torch.from_numpy(document.query_positions).to(model.device)
            found += document.correct(model.lm_head(states[where]).argmax(-1).cpu().numpy())
    return found / sum(len(d.answers) for d in documents)


class Checkpoint:
    """Weights and optimizer state as safetensors and the place in the recipe as JSON, whole or not at all."""

    def __init__(self, out: Path) -> None:
        self.folder = out / "checkpoint"

    def save(self, model: PreTrainedModel, optimizer: torch.optim.AdamW, place: dict[str, int]) -> None:
        """Write the state after ``place["step"]`` steps of ``place["stage"]``."""
        tensors = {f"model.{n}": p.detach().contiguous() for n, p in model.named_parameters()}
        for name, p in model.named_parameters():
            for key, value in optimizer.state[p].items():
                tensors[f"optimizer.{key}.{name}"] = value.detach().clone()
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{place['stage']}-{place['step']}.safetensors"
        save_file(tensors, self.folder / f".{name}")
        (self.folder / f".{name}").replace(self.folder / name)
        state = self.folder / ".state.json"
        state.write_text(json.dumps({**place, "file": name}))
        state.replace(self.folder / "state.json")
        for old in self.folder.glob("*.safetensors"):
            if old.name != name:
                old.unlink()

    def load(self, model: PreTrainedModel, optimizer: torch.optim.AdamW) -> dict[str, int] | None:
        """Restore the newest state and return its place; None if there is none."""
        state = self.folder / "state.json"
        if not state.exists():
            return None
        place = json.loads(state.read_text())
        tensors = load_file(self.folder / place.pop("file"))
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(tensors[f"model.{name}"])
                optimizer.state[p] = {
                    key: tensors[f"optimizer.{key}.{name}"].to(
                        "cpu" if key == "step" and p.device.type == "cpu" else p.device
                    )
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        return place


def prefetched(
    mixture: Mixture, stage: dict[str, Any], seed: tuple[int, ...], steps: range, size: int
) -> Iterator[np.ndarray]:
    """Yield the batches of ``steps`` in order, made a few steps ahead in threads."""
    ahead = 6
    with ThreadPoolExecutor(4) as pool:
        waiting: list[Future[np.ndarray]] = []
        for step in [*steps, *[None] * ahead]:
            if step is not None:
                shares = {"needles": stage["needles"], "repeats": stage["repeats"]}
                waiting.append(pool.submit(mixture.batch, stage["length"], size, (*seed, step), **shares))
            if len(waiting) > ahead or (step is None and waiting):
                yield waiting.pop(0).result()


def train(args: argparse.Namespace, recipe: dict[str, Any], tokenizer: Any, deadline: float) -> bool:
    """Run the stages that are not done yet; return whether all are."""
    device = torch.device(args.device)
    books = tokenise(args.books, tokenizer, args.out / "books.npy")
    print(f"{len(books) / 1e6:.1f} M tokens of books")
    model = build(recipe, len(tokenizer), tokenizer.eos_token_id).to(device)
    settings = recipe["optimizer"]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings["weight_decay"]},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=tuple(settings["betas"]), fused=device.type == "cuda")
    checkpoint = Checkpoint(args.out)
    if args.start_from is not None:
        trained = AutoModelForCausalLM.from_pretrained(args.start_from, dtype=torch.float32)
        model.load_state_dict(trained.state_dict())
    place = checkpoint.load(model, optimizer) or {"stage": args.first_stage - 1, "step": 0}
    mixture = Mixture(books, tokenizer, recipe["data"]["digits"])
    loss_of = token_loss
    if not args.no_compile:
        torch._dynamo.config.recompile_limit = 64
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        loss_of = torch.compile(token_loss, dynamic=False)
    for index, stage in enumerate(recipe["stage"]):
        if index < place["stage"]:
            continue
        first = place["step"] if index == place["stage"] else 0
        steps = round(stage["tokens"] / stage["batch"])
        size, passes = int(stage["sequences"]), round(stage["batch"] / stage["length"] / stage["sequences"])
        order = fastest_attention(stage["length"], recipe, device)
        probes = [mixture.task.make(stage["length"], seed) for seed in range(4)]
        started, seen = time.perf_counter(), 0
        batches = prefetched(mixture, stage, (recipe["seed"], index), range(first, steps), size * passes)
        losses: list[Tensor] = []
        for step, batch in zip(range(first, steps), batches, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(stage, settings, step, steps)
            tokens = torch.from_numpy(batch).to(device, non_blocking=True)
            total = torch.zeros((), device=device)
            for part in tokens.split(size):
                with (
                    torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
                    sdpa_kernel(order, set_priority=True),
                ):
                    hidden = hidden_states(model, part)[:, :-1].flatten(0, 1)
                    loss = loss_of(hidden, model.lm_head.weight, part[:, 1:].flatten()) / passes
                loss.backward()
                total += loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(total)
            seen += tokens.numel()
            last = step + 1 == steps
            if (step + 1) % 50 == 0 or last or args.check_every:
                mean = float(torch.stack(losses).mean())
                losses.clear()
                if not math.isfinite(mean):
                    sys.exit(
                        f"error: loss is {mean} near step {step} of stage {index}; "
                        f"the last checkpoint is kept in {checkpoint.folder}"
                    )
                elapsed = time.perf_counter() - started
                left = elapsed / (step + 1 - first) * (steps - step - 1)
                needle = needles_found(model, probes)
                print(
                    f"stage {index + 1} ({stage['length']})  step {step + 1}/{steps}  loss {mean:.4f}  "
                    f"norm {float(norm):.2f}  needles {needle:.2f}  "
                    f"{seen / elapsed / 1e6:.2f} M tok/s  {left:.0f} s left",
                    flush=True,
                )
                row = {"stage": index, "step": step + 1, "loss": mean, "needles": needle}
                with (args.out / "metrics.jsonl").open("a") as log:
                    log.write(json.dumps(row) + "\n")
            stop = time.perf_counter() > deadline
            if last and needle < stage["expect"]:
                sys.exit(
                    f"error: stage {index + 1} ends with {needle:.0%} of the needles found, the recipe "
                    f"expects {stage['expect']:.0%}; change its data or its learning rate"
                )
            if last:
                checkpoint.save(model, optimizer, {"stage": index + 1, "step": 0})
            elif stop or (args.save_every and (step + 1) % args.save_every == 0):
                checkpoint.save(model, optimizer, {"stage": index, "step": step + 1})
            if stop:
                print("time is up; run the same command again to continue")
                return False
    return True


def main() -> None:
    """Run everything that is not done yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--books", type=Path, nargs="+", required=True, help="training texts: .txt, folders or .tar.xz"
    )
    parser.add_argument("--heldout", type=Path, nargs="+", required=True, help="texts for evaluation only")
    parser.add_argument("--out", type=Path, default=Path("runs/teacher"), help="default: %(default)s")
    parser.add_argument("--recipe", type=Path, default=HERE / "recipe.toml", help="default: %(default)s")
    parser.add_argument(
        "--tokenizer", type=Path, default=HERE / "tokenizer", help="trained if it does not exist"
    )
    parser.add_argument("--start-from", type=Path, help="folder of trained weights to continue from")
    parser.add_argument(
        "--first-stage", type=int, default=1, help="stage to begin with, from 1 (default: %(default)s)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--max-seconds", type=float, default=math.inf, help="stop with a checkpoint after this time"
    )
    parser.add_argument(
        "--save-every", type=int, default=500, help="steps between checkpoints (default: %(default)s)"
    )
    parser.add_argument("--check-every", action="store_true", help="log every step")
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    args = parser.parse_args()
    deadline = time.perf_counter() + args.max_seconds
    recipe = tomllib.loads(args.recipe.read_text())
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    if not args.tokenizer.exists():
        take = recipe["tokenizer"]["characters_per_book"]
        texts = (t[len(t) // 3 : len(t) // 3 + take] for t in read_books(args.books))
        train_tokenizer(texts, args.tokenizer, recipe["tokenizer"]["vocab_size"])
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    if not train(args, recipe, tokenizer, deadline):
        return
    model = build(recipe, len(tokenizer), tokenizer.eos_token_id).to(args.device)
    Checkpoint(args.out).load(model, torch.optim.AdamW(model.parameters()))
    # What is shipped is what is evaluated: weights rounded to bfloat16.
    model.to(torch.bfloat16).to(torch.bfloat16 if args.device == "cuda" else torch.float32).eval()
    heldout = tokenise(args.heldout, tokenizer, args.out / "heldout.npy")
    results = evaluate(model, tokenizer, heldout, recipe)
    export(model, tokenizer, results, recipe, args.out / "teacher")
    print(f"the teacher is in {args.out / 'teacher'}")


if __name__ == "__main__":
    main()
