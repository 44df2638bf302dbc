"""Answer prompts by vLLM with sparse prefill, and say how much was read; needs vLLM (docs/serving.md).

.venv/vllm/bin/python examples/serve_vllm.py
"""

import argparse
import os
import re

# The engine in this process, so that its counts can be shown below.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from prometheus_client import REGISTRY
from vllm import LLM, SamplingParams

from seerattention.measure.bundled import GATES, TEACHER, TEXT

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=str(TEACHER), help="hub id or folder")
    parser.add_argument("--gates", default=str(GATES), help="hub id or folder")
    parser.add_argument("--policy", default="top_k:0.1,sink_blocks=1,dense_last_rows=2")
    args = parser.parse_args()

    settings = {"gates": args.gates, "policy": args.policy}
    llm = LLM(
        args.model,
        max_model_len=16384,
        gpu_memory_utilization=0.5,  # of the machine's memory, on a CPU too
        additional_config={"seerattention": settings},
    )
    book = TEXT.read_text(encoding="utf-8")
    prompts = [book[begin : begin + 20_000] for begin in (0, 50_000)]
    for out in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=20)):
        print(f"{len(out.prompt_token_ids):,} tokens, then: {out.outputs[0].text!r}")
    counted = {"read": 0.0, "causal": 0.0}
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            if found := re.fullmatch(r"seerattention_blocks_(read|causal)_total", sample.name):
                counted[found[1]] += sample.value
    print(f"{counted['read'] / counted['causal']:.1%} of the blocks read")
