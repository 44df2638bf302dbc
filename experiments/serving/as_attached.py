"""Whether vLLM chooses what the attached model chooses, row by row, on the device at hand.

    .venv/vllm/bin/python -m experiments.serving.as_attached --dtype float32

The bundled model, its gates, and prompts at lengths that no block divides: alone, in pieces, after a shared
prefix, and several at once. In 16 bits the two run other matrix products, so some rows near a tie differ.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

LENGTHS = (4096, 2777, 777, 130)
PIECE = 1024
EVERYTHING = "top_k:1.0"


class Chosen(dict[tuple[int, int, int], list[list[int]]]):
    """An observer: which blocks every head reads in a row, by layer, prompt tokens and the row's position."""

    def __call__(self, layer: int, call: Any, selection: Any) -> None:
        """Remember what was chosen."""
        tokens, mask = call.prompt_tokens or call.rows.num_keys, selection.to_mask()[0].cpu()
        for row in range(selection.shape[2]):
            position = call.rows.first + row * selection.block_size[0]
            self[layer, tokens, position] = [heads.nonzero().flatten().tolist() for heads in mask[:, row]]


def alike(ours: list[int], theirs: list[int]) -> int:
    """Return how many leading tokens two answers share."""
    return next(
        (at for at, both in enumerate(zip(ours, theirs, strict=True)) if both[0] != both[1]), len(ours)
    )


def main() -> None:
    """Compare and write a result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", default="top_k:0.1", help="which blocks are read")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights")
    parser.add_argument("--attention", help="one of vLLM's backends, by name")
    parser.add_argument("--answer", type=int, default=12, help="tokens of an answer")
    parser.add_argument("--out", type=Path, help="result file, JSON")
    asked = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.inputs import TokensPrompt
    from vllm.platforms import current_platform

    from seerattention import attach, load_gates
    from seerattention.files import write_json
    from seerattention.hosts.vllm.served import served_in
    from seerattention.measure import bundled
    from seerattention.policies import parse

    rows: list[dict[str, Any]] = []
    model, tokenizer = bundled.load_teacher(getattr(torch, asked.dtype))
    model.to("cpu" if current_platform.is_cpu() else "cuda")
    text, seen = bundled.text_tokens(tokenizer)[1], Chosen()
    attach(model, load_gates(bundled.GATES), asked.policy, min_tokens=0, observe=seen)

    def tell(what: str, **found: Any) -> None:
        rows.append({"what": what, "dtype": asked.dtype, **found})
        print(json.dumps(rows[-1]), flush=True)

    def alone(prompt: list[int]) -> tuple[list[int], list[int], Chosen]:
        """Answer a prompt by the attached model."""
        seen.clear()
        ids = torch.tensor([prompt], device=model.device)
        out = model.generate(ids, max_new_tokens=asked.answer, do_sample=False, eos_token_id=None)
        return prompt, out[0, len(prompt) :].tolist(), Chosen(seen)

    def answers(llm: Any, given: list[list[int]]) -> list[list[int]]:
        """Answer prompts that come together."""
        params = SamplingParams(temperature=0, max_tokens=asked.answer, ignore_eos=True)
        out = llm.generate([TokensPrompt(prompt_token_ids=one) for one in given], params, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in out]

    def engine(**extra: Any) -> Any:
        if asked.attention:
            extra["attention_backend"] = asked.attention
        return LLM(
            str(bundled.TEACHER),
            dtype=asked.dtype,
            enforce_eager=True,
            max_model_len=4608,
            max_num_batched_tokens=8192,
            # Room for both engines and the attached model.
            gpu_memory_utilization=0.3,
            kv_cache_memory_bytes=2**30,
            # So that a prompt's pages can be forgotten as soon as it is answered.
            async_scheduling=False,
            **extra,
        )

    def compared(
        llm: Any, what: str, given: list[tuple[list[int], list[int], Chosen]], cached: int = 0
    ) -> None:
        """Tell how many rows choose alike, of those that are not found in shared pages."""
        served = served_in(llm.llm_engine.vllm_config)
        assert served is not None
        now = served.observe = Chosen()
        said = answers(llm, [prompt for prompt, _, _ in given])
        wanted = {key: row for _, _, chosen in given for key, row in chosen.items() if key[2] >= cached}
        same = sum(now.get(key) == row for key, row in wanted.items())
        tokens = [alike(ours, answer) for ours, (_, answer, _) in zip(said, given, strict=True)]
        tell(what, rows=len(wanted), alike=same, beside=len(now.keys() - wanted.keys()), tokens=tokens)

    prompts = [text[5000 * at : 5000 * at + length].tolist() for at, length in enumerate(LENGTHS, 1)]
    llm = engine()
    plain = answers(llm, prompts)
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()

    settings = {"gates": str(bundled.GATES), "policy": EVERYTHING, "min_tokens": 0, "summaries": "made"}
    llm = engine(additional_config={"seerattention": settings})
    tokens = [alike(*both) for both in zip(answers(llm, prompts), plain, strict=True)]
    tell("everything is read, beside vLLM without gates", tokens=tokens)
    served = served_in(llm.llm_engine.vllm_config)
    assert served is not None
    served.layer = replace(served.layer, prefill=replace(served.layer.prefill, policy=parse(asked.policy)))
    expected = [alone(prompt) for prompt in prompts]
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    for piece in (8192, PIECE):
        scheduler.max_num_scheduled_tokens = piece
        for one in expected:
            llm.reset_prefix_cache()
            compared(llm, f"{len(one[0])} tokens in pieces of {piece}", [one])
    scheduler.max_num_scheduled_tokens = 8192
    llm.reset_prefix_cache()
    compared(llm, "three at once", expected[1:])
    # Of as many tokens, so that the first prompt's rows have read what the second's would.
    shared = 2500
    second = prompts[0][:shared] + text[30000 : 30000 + LENGTHS[0] - shared].tolist()
    llm.reset_prefix_cache()
    answers(llm, prompts[:1])
    page = llm.llm_engine.vllm_config.cache_config.block_size
    compared(llm, "a prefix that another prompt left", [alone(second)], shared // page * page)
    if asked.out is not None:
        write_json(asked.out, {"policy": asked.policy, "rows": rows})
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
