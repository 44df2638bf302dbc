"""Time per token of a Llama-3.1-8B-shaped model with random weights over a long cache, dense and sparse.

python benchmarks/decode_step.py --out benchmarks/results/h200/decode_step.json

A step is the whole model, from token to next token, over a static cache of random keys, on a GPU captured in
a CUDA graph. Dense is what transformers runs ("sdpa"), and the best kernel that PyTorch has for it. The
largest size takes 64 GiB of keys and values and 16 GB of weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import script
import torch
from rich.progress import Progress
from torch import Tensor
from transformers import AttentionInterface, StaticCache
from transformers.masking_utils import AttentionMaskInterface

from seerattention.bench.models import SHAPES, random_config, random_model
from seerattention.bench.peers import DENSE, dense_peers, dense_step
from seerattention.cli.bench.decode import size_of
from seerattention.hosts.transformers import attach, detach, new_gates, usage
from seerattention.measure.timing import interleaved, timed

SIZES = [f"1x{n << 10}" for n in (8, 16, 32, 64, 128)] + ["4x131072"]
#: Free places of a cache: a step takes one, untimed ones too.
ROOM = 256
#: Steps in a sample.
STEPS = 20
#: What transformers calls a kernel that reads a whole cache without a mask.
WHOLE = "whole-cache"


def make_cache(model: Any, batch: int, tokens: int) -> Any:
    """Return a full cache of random keys and values, but for its last places."""
    config = model.config
    cache: Any = StaticCache(config, max_cache_len=tokens)
    shape = batch, config.num_key_value_heads, config.head_dim
    cache.early_initialization(*shape, model.dtype, model.device)
    for layer in cache.layers:
        for x in (layer.keys, layer.values):
            x.normal_()
    return cache


def dense_kernel(cache: Any, heads: int) -> str:
    """Return the name of the fastest dense kernel over a cache's first layer."""
    k, v = cache.layers[0].keys, cache.layers[0].values
    q = torch.randn(len(k), heads, 1, k.shape[3], device=k.device, dtype=k.dtype)
    kernels = dense_peers(k.device.type, list(DENSE), dense_step)
    seconds = interleaved({n: partial(run, q, k, v) for n, run in kernels.items()}, device=k.device)
    return min(seconds, key=lambda name: median(seconds[name]))


def register(kernel: str) -> None:
    """Make a dense kernel known to transformers, which then makes no mask."""

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, **_: Any) -> tuple[Tensor, None]:
        out = dense_peers(q.device.type, list(DENSE), dense_step)[kernel](q, k, v)
        return out.reshape(len(q), 1, *q.shape[1::2]), None

    AttentionInterface.register(WHOLE, attend)
    AttentionMaskInterface.register(WHOLE, lambda *_, **__: None)


@contextmanager
def method(model: Any, name: str, gates: Any, policy: str) -> Iterator[None]:
    """Set a model up for one way to decode."""
    if name == "sparse":
        attach(model, gates, decode=policy)
        yield
        assert set(usage(model)) == {"sparse: decoding step"}, usage(model)
        detach(model)
    else:
        model.set_attn_implementation("sdpa" if name == "dense, sdpa" else WHOLE)
        yield
        model.set_attn_implementation("sdpa")


def stepping(model: Any, cache: Any) -> Callable[[], object]:
    """Return what makes the next token, from a cache whose last places are free again."""
    places = cache.layers[0].keys.shape[2] - ROOM
    for layer in cache.layers:
        layer.cumulative_length.fill_(places)
    ids = torch.zeros(len(cache.layers[0].keys), 1, dtype=torch.long, device=model.device)

    def step() -> None:
        logits = model(ids, past_key_values=cache, use_cache=True).logits
        ids.copy_(logits[:, -1].argmax(-1, keepdim=True))

    # The first step summarises what is in the cache and compiles; the second is as all others.
    for _ in range(3):
        step()
    if not ids.is_cuda:
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def sample(run: Callable[[], object], steps: int) -> float:
    """Return the mean seconds of a step."""

    def several() -> None:
        for _ in range(steps):
            run()

    return timed(several)[1] / steps


@torch.inference_mode()
def measure(
    model: Any, gates: Any, size: tuple[int, int], args: argparse.Namespace, step: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Measure every way to decode at one size, in turn."""
    batch, tokens = size
    cache = make_cache(model, batch, tokens)
    kernel = dense_kernel(cache, model.config.num_attention_heads)
    register(kernel)
    policy = f"token_budget:{max(64, round(args.density * tokens / 64) * 64)}"
    methods = {"dense, sdpa": "chosen by PyTorch", "dense, best kernel": kernel, "sparse": policy}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(args.repeats):
        for name in methods:
            with method(model, name, gates, policy):
                run = stepping(model, cache)
                sample(run, 2)
                seconds[name].append(sample(run, args.steps))
                del run
            step(name)
    best = min(median(found) for name, found in seconds.items() if name != "sparse")
    rows = []
    for name, found in seconds.items():
        row = {"batch": batch, "tokens": tokens, "method": name, "how": methods[name]} | script.times(found)
        row |= {"tokens_per_s": round(batch / median(found), 1), "speedup": round(best / median(found), 3)}
        rows.append(row)
    return rows


def main() -> None:
    """Measure every size and write the report."""
    parser = script.parser(__doc__, [], repeats=3)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="BATCHxTOKENS (default: %(default)s)")
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b", help="default: %(default)s")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--density", type=float, default=0.1, help="share of the cache that a step reads")
    parser.add_argument("--steps", type=int, default=STEPS, help="in a sample (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    model = random_model(random_config(args.shape, layers=args.layers), args.device, dtype)
    gates = new_gates(model, phase="decode").to(model.dtype)
    about = script.model_settings(model, args.shape) | {"density": args.density}
    rows: list[dict[str, Any]] = []
    with Progress() as progress:
        task = progress.add_task("decoding", total=len(args.sizes) * args.repeats * 3)
        for size in args.sizes:
            found = measure(model, gates, size_of(size), args, lambda name: progress.advance(task))
            for row in found:
                progress.print(*row.values())
            rows += found
            # Large ones come last: what is stopped there keeps what it has.
            script.write(args.out, rows, args.device, **about)


if __name__ == "__main__":
    main()
