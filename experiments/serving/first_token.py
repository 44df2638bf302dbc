"""How long vLLM takes to a prompt's first token, dense and sparse, summaries made anew or kept.

    .venv/vllm/bin/python -m experiments.serving.first_token --out benchmarks/results/cpu/first_token.json

Runs in the environment of ``make test-vllm``; on two cores for ten minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

LENGTHS = [4096, 8192, 16384, 32000]
WAYS = {"dense": None, "made": "made", "kept": "kept"}


def seconds(llm: Any, prompts: list[list[int]]) -> list[float]:
    """Time from a prompt to its first token, of prompts that come one after the other."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    one, times = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True), []
    for prompt in prompts:
        begin = time.perf_counter()
        llm.generate([TokensPrompt(prompt_token_ids=prompt)], one, use_tqdm=False)
        times.append(time.perf_counter() - begin)
    return times


def main() -> None:
    """Measure and write a result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="result file, JSON")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32000], help="tokens of prompts"
    )
    parser.add_argument("--pieces", type=int, nargs="+", default=[512, 2048], help="tokens of a batch")
    parser.add_argument("--policy", default="top_k:0.1,sink_blocks=1", help="which blocks are read")
    parser.add_argument("--repeats", type=int, default=3, help="prompts of each length, whose median counts")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights")
    asked = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.version import __version__ as version

    from seerattention.files import write_json
    from seerattention.measure import bundled
    from seerattention.measure.versions import versions

    text = bundled.text_tokens(bundled.load_teacher()[1])[1]
    rows = []
    for piece in asked.pieces:
        for way, summaries in WAYS.items():
            settings = {
                "gates": str(bundled.GATES),
                "policy": asked.policy,
                "summaries": summaries,
                "min_tokens": 0,
            }
            extra = {} if summaries is None else {"additional_config": {"seerattention": settings}}
            llm = LLM(
                str(bundled.TEACHER),
                dtype=asked.dtype,
                enforce_eager=True,
                max_model_len=max(asked.lengths) + 16,
                max_num_batched_tokens=piece,
                enable_prefix_caching=False,
                num_gpu_blocks_override=max(asked.lengths) // 128 + 8,
                **extra,
            )
            for length in asked.lengths:
                # The first one warms up.
                prompts = [text[begin : begin + length].tolist() for begin in range(asked.repeats + 1)]
                times = seconds(llm, prompts)[1:]
                row = {"way": way, "piece": piece, "length": length, "seconds": statistics.median(times)}
                rows.append({**row, "spread": max(times) - min(times)})
                print(json.dumps(rows[-1]), flush=True)
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()
    about = {"policy": asked.policy, "dtype": asked.dtype, "versions": {**versions(), "vllm": version}}
    write_json(asked.out, {**about, "rows": rows})


if __name__ == "__main__":
    main()
