"""Time to the first token of a Llama-3.1-8B-shaped model with random weights, dense and sparse.

python benchmarks/end_to_end.py --out benchmarks/results/h200/end_to_end.json

Random weights attend almost evenly, which is fine for time: ``top_k`` reads the same number of blocks
whatever the scores are.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import script
import torch
from rich.progress import Progress
from torch.nn.attention import sdpa_kernel

from seerattention.bench.models import SHAPES, random_config, random_model
from seerattention.engine import layer, summaries
from seerattention.gate import GateConfig
from seerattention.hosts.transformers import attach, detach, new_gates, usage
from seerattention.ops.dense_attention import CUDNN_FIRST

POLICY = "top_k:0.1,sink_blocks=1"
#: Of gates; the last is the default with scores in eight bits.
DESIGNS = ("published", "default", "8-bits")
#: Which part a module belongs to, by the last word of its name.
MODULES = {"mlp": "mlp"} | dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "projections")
PARTS = ("attention", "selection", "mlp", "projections", "rest")


def make_gates(model: Any, design: str) -> Any:
    """Return gates with random weights in the model's precision."""
    base, settings = model.config, {}
    if design == "published":
        published = GateConfig.published(
            num_heads=base.num_attention_heads,
            num_kv_heads=base.num_key_value_heads,
            head_dim=base.head_dim,
        )
        shape = ("num_heads", "num_kv_heads", "head_dim")
        settings = {k: v for k, v in asdict(published).items() if k not in shape}
    elif design == "8-bits":
        settings = {"score_dtype": "float8_e4m3fn"}
    torch.manual_seed(0)
    return new_gates(model, **settings).to(model.dtype)


class Parts:
    """Time spent in parts of a forward pass: CUDA events on a GPU, which wait for nothing."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def now(self) -> Any:
        """Return the time, as an event on a GPU."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wrapped(self, part: str, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function and count its time."""
        start = self.now()
        result = run(*args, **kwargs)
        self.spans[part].append((start, self.now()))
        return result

    def _counted(self, part: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function, or a method, that counts its time."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            return self.wrapped(part, run, *args, **kwargs)

        return counted

    @contextmanager
    def watch(self, model: Any) -> Iterator[None]:
        """Count the parts of everything the model computes inside this context."""
        starts: dict[Any, Any] = {}

        def before(module: Any, args: Any) -> None:
            starts[module] = self.now()

        def after(part: str, module: Any, args: Any, output: Any) -> None:
            self.spans[part].append((starts.pop(module), self.now()))

        functional = torch.nn.functional
        replaced = (
            (functional, "scaled_dot_product_attention", "attention"),
            (layer, "block_sparse_attention", "attention"),
            (layer, "select_blocks", "selection"),
            (summaries.Growing, "follow", "selection"),
        )
        with ExitStack() as stack:
            for owner, name, part in replaced:
                stack.enter_context(patch.object(owner, name, self._counted(part, getattr(owner, name))))
            for name, module in model.named_modules():
                if part := MODULES.get(name.rpartition(".")[2]):
                    stack.callback(module.register_forward_pre_hook(before).remove)
                    stack.callback(module.register_forward_hook(partial(after, part)).remove)
            yield

    def seconds(self) -> dict[str, float]:
        """Return the total of every part."""
        if self.cuda:
            torch.cuda.synchronize()
            return {p: sum(a.elapsed_time(b) for a, b in spans) / 1e3 for p, spans in self.spans.items()}
        return {p: sum(b - a for a, b in spans) for p, spans in self.spans.items()}


@torch.inference_mode()
def first_token(model: Any, ids: torch.Tensor) -> float:
    """Return the seconds from the prompt to the first token."""
    cuda = ids.is_cuda
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    with sdpa_kernel(CUDNN_FIRST, set_priority=True) if cuda else ExitStack():
        int(model(ids, logits_to_keep=1, use_cache=True).logits[0, -1].argmax())
    return time.perf_counter() - start


@contextmanager
def attached(model: Any, gates: Any, backend: str) -> Iterator[None]:
    """Attach gates, or nothing for None."""
    if gates is not None:
        attach(model, gates, POLICY, backend=backend, min_tokens=0)
    yield
    if gates is not None:
        assert set(usage(model)) == {"sparse"}, usage(model)
        detach(model)


def measure(
    model: Any, gates: dict[str, Any], tokens: int, args: argparse.Namespace, step: Callable[[], None]
) -> list[dict[str, Any]]:
    """Measure dense attention and every gate design at one length, in turn."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=model.device)
    cuda = ids.is_cuda
    seconds: dict[str, list[float]] = {name: [] for name in gates}
    rows = []
    for round_ in range(args.repeats + 1):
        for name, gate in gates.items():
            with attached(model, gate, args.backend):
                took = first_token(model, ids)
            # The first round compiles and plans.
            if round_:
                seconds[name].append(took)
            step()
    for name, gate in gates.items():
        parts = Parts(cuda)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with attached(model, gate, args.backend), parts.watch(model):
            whole = first_token(model, ids)
        spent = parts.seconds()
        spent["rest"] = whole - sum(spent.values())
        total = median(seconds[name])
        rows.append(
            {
                "tokens": tokens,
                "method": name,
                "first_token_s": round(total, 4),
                "range_s": [round(min(seconds[name]), 4), round(max(seconds[name]), 4)],
                "speedup": round(median(seconds["dense"]) / total, 3),
                "parts_s": {part: round(spent.get(part, 0.0), 4) for part in PARTS},
                "peak_gb": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
            }
        )
        step()
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    titles = ("tokens", "method", "first token s", "speedup", *(f"{part} s" for part in PARTS), "peak GB")
    lines = [titles]
    for row in rows:
        parts = (f"{row['parts_s'][part]:.3f}" for part in PARTS)
        peak = "" if row["peak_gb"] is None else f"{row['peak_gb']:.1f}"
        time_ = f"{row['first_token_s']:.3f}", f"{row['speedup']:.2f}x"
        lines.append((f"{row['tokens']:,}", row["method"], *time_, *parts, peak))
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def main() -> None:
    """Measure every length and write the report."""
    parser = script.parser(__doc__, [32768, 131072], repeats=2)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b", help="default: %(default)s")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--gate", choices=DESIGNS, action="append", help="repeatable; default all")
    parser.add_argument("--backend", default="auto", help="of block_sparse_attention (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    model = random_model(random_config(args.shape, layers=args.layers), args.device, dtype)
    designs = args.gate or DESIGNS
    gates = {"dense": None} | {name: make_gates(model, name) for name in designs}
    about = script.model_settings(model, args.shape) | {"policy": POLICY, "backend": args.backend}
    rows: list[dict[str, Any]] = []
    with Progress() as progress:
        task = progress.add_task("prefill", total=len(args.tokens) * len(gates) * (args.repeats + 2))
        for tokens in args.tokens:
            rows += measure(model, gates, tokens, args, lambda: progress.advance(task))
            # Long ones come last: what is stopped there keeps what it has.
            script.write(args.out, rows, args.device, **about)
    show(rows)


if __name__ == "__main__":
    main()
