"""How long vLLM takes to a prompt's first token, dense and sparse, summaries made anew or kept.

    .venv/vllm/bin/python -m experiments.serving.first_token --out benchmarks/results/cpu/first_token.json

Runs in the environment of ``make test-vllm``; on two cores for ten minutes. On a GPU, a model of the shape of
Llama 3.1 8B with random weights, each way in a process of its own, and requests that are answered together:

    python -m experiments.serving.first_token --shape llama-8b --ways dense --lengths 32768 131072
    --pieces 8192 32768 --requests 16 --policy top_k:0.1 --out dense.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from seerattention.bench.models import SHAPES, random_config

WAYS = {"dense": None, "made": "made", "kept": "kept"}
#: Tokens that every one of several requests is answered with.
ANSWER = 256
#: What a GPU runs eagerly and what as graphs, dense and sparse alike: nothing is compiled, since a start
#: would take minutes, and steps that only decode are replayed.
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16]}


def make_shape(folder: Path, shape: str, tokens: int, dtype: str, shared: int) -> tuple[Path, Path]:
    """Write the configuration of a model of a shape, and untrained gates for it.

    Args:
        folder: Where to.
        shape: A name in `seerattention.bench.models.SHAPES`.
        tokens: The model's positions.
        dtype: Of the gates.
        shared: Layers per gate.

    Returns:
        The folders of both.
    """
    import torch

    from seerattention.gate_config import GateConfig, design_of
    from seerattention.hosts.transformers import BaseInfo, save_gates
    from seerattention.hosts.transformers.gates import Gates
    from seerattention.hosts.vllm.choice import skeleton

    config = random_config(shape, tokens, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder / "model")
    model = skeleton(SimpleNamespace(hf_text_config=config, model=shape))
    base, layers = BaseInfo.of(model), range(config.num_hidden_layers)
    heads = {"num_heads": base.num_heads, "num_kv_heads": base.num_kv_heads, "head_dim": base.head_dim}
    torch.manual_seed(0)
    gates = Gates(GateConfig.from_dict(design_of(heads)), base, list(layers)[::shared])
    save_gates(gates.to(getattr(torch, dtype)), folder / "gates")
    return folder / "model", folder / "gates"


def cache_bytes(model: Path, tokens: int, dtype: str) -> int:
    """Return what keys and values of so many tokens take."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return tokens * numbers * getattr(torch, dtype).itemsize


def seconds(llm: Any, prompts: list[list[int]], tokens: int = 1) -> float:
    """Time until prompts that come together are answered with so many tokens each."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    given = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    for out in llm.generate(given, params, use_tqdm=False):
        assert len(out.outputs[0].token_ids) == tokens, "an answer ended early"
    return time.perf_counter() - begin


def measured(llm: Any, prompts: Any, asked: argparse.Namespace, way: str) -> list[dict[str, Any]]:
    """Return a row for every piece and length, then one for requests that are answered together."""
    rows = []

    def tell(**row: Any) -> None:
        aligned = {"aligned": True} if asked.aligned and way != "dense" else {}
        rows.append({"way": way, **aligned, **row})
        print(json.dumps(rows[-1]), flush=True)

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    for piece in asked.pieces:
        scheduler.max_num_scheduled_tokens = piece
        for length in asked.lengths:
            # The first one warms up.
            times = [seconds(llm, [prompts(length, index)]) for index in range(asked.repeats + 1)][1:]
            spread = max(times) - min(times)
            tell(piece=piece, length=length, seconds=statistics.median(times), spread=spread)
    if asked.requests:
        piece, length = asked.pieces[0], asked.lengths[0]
        scheduler.max_num_scheduled_tokens = piece
        given = [prompts(length, index) for index in range(asked.requests)]
        took = seconds(llm, given, ANSWER)
        tell(piece=piece, length=length, requests=asked.requests, answer=ANSWER, together=took)
    return rows


def main() -> None:
    """Measure and write a result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="result file, JSON")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="of a model with random weights")
    parser.add_argument("--ways", nargs="+", choices=sorted(WAYS), default=list(WAYS), help="all by default")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32000], help="tokens of prompts"
    )
    parser.add_argument("--pieces", type=int, nargs="+", default=[512, 2048], help="tokens of a batch")
    parser.add_argument("--policy", default="top_k:0.1,sink_blocks=1", help="which blocks are read")
    parser.add_argument("--repeats", type=int, default=3, help="prompts of each length, whose median counts")
    parser.add_argument("--requests", type=int, default=0, help="answered together, of the first length")
    parser.add_argument("--layers-per-gate", type=int, default=1, help="of gates made for a shape")
    parser.add_argument("--aligned", action="store_true", help="end pieces of prompts where blocks end")
    parser.add_argument("--attention", help="one of vLLM's backends, by name")
    parser.add_argument("--eager", action="store_true", help="replay no graphs on a GPU")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights")
    asked = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform
    from vllm.version import __version__ as version

    from seerattention.files import write_json
    from seerattention.measure import bundled
    from seerattention.measure.versions import versions

    cpu, room = current_platform.is_cpu(), max(asked.lengths) + ANSWER
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as made:
        if asked.shape is None:
            model, gates = bundled.TEACHER, bundled.GATES
            text = bundled.text_tokens(bundled.load_teacher()[1])[1]
        else:
            model, gates = make_shape(Path(made), asked.shape, room, asked.dtype, asked.layers_per_gate)
            draw = torch.Generator().manual_seed(0)
            text = torch.randint(SHAPES[asked.shape]["vocab_size"], (room + 64,), generator=draw).numpy()
        for way in asked.ways:
            settings = {
                "gates": str(gates),
                "policy": asked.policy,
                "summaries": WAYS[way],
                "aligned": asked.aligned,
                "min_tokens": 0,
                "check_base": asked.shape is None,
            }
            extra: dict[str, Any] = {}
            if WAYS[way] is not None:
                extra["additional_config"] = {"seerattention": settings}
            if asked.shape is not None:
                extra |= {"load_format": "dummy", "skip_tokenizer_init": True}
            if cpu:
                extra |= {"enforce_eager": True, "num_gpu_blocks_override": room // 128 + 8}
            else:
                extra |= {"enforce_eager": True} if asked.eager else {"compilation_config": GRAPHS}
                extra["max_num_seqs"] = 16
                together = asked.requests * (asked.lengths[0] + ANSWER)
                extra["kv_cache_memory_bytes"] = cache_bytes(model, max(room, together) + 2**12, asked.dtype)
            if asked.attention:
                extra["attention_backend"] = asked.attention
            llm = LLM(
                str(model),
                dtype=asked.dtype,
                max_model_len=room,
                max_num_batched_tokens=max(asked.pieces),
                enable_prefix_caching=False,
                **extra,
            )
            rows += measured(llm, lambda length, at: text[at : at + length].tolist(), asked, way)
            about = {"policy": asked.policy, "dtype": asked.dtype, "shape": asked.shape}
            about["versions"] = {**versions(), "vllm": version}
            write_json(asked.out, {**about, "rows": rows})
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
