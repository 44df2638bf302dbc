"""Engines of their own kind: without settings, reading everything, short of pages, in half precision."""

import torch
from vllm.v1.core.sched.scheduler import Scheduler

from tests.vllm.engines import Alone, answers, engine, served_by, settings, texts, watched


def test_a_preempted_request(monkeypatch):
    """It comes again with what it said before, which is decoded, not chosen for."""
    preempted = []
    own = Scheduler._preempt_request

    def noted(self, request, *more, **named):
        preempted.append(request.num_tokens - request.num_prompt_tokens)
        return own(self, request, *more, **named)

    monkeypatch.setattr(Scheduler, "_preempt_request", noted)
    prompts = texts(640, 600, begin=36000)
    alone = Alone()
    expected = [alone.answer(prompt, 200) for prompt in prompts]
    rows = alone.seen.taken()
    with engine(settings(), num_gpu_blocks_override=13, max_model_len=1024) as llm:
        seen = watched(llm)
        assert answers(llm, prompts, 200) == expected
    assert preempted
    assert max(preempted) > 0
    assert seen == rows


def test_everything_read_is_plain_vllm():
    prompts = texts(1500, 777, 130, 64, begin=20000)
    with engine() as plain:
        expected = answers(plain, prompts)
        assert served_by(plain) is None
    with engine(settings("top_k:1.0"), max_num_batched_tokens=500) as llm:
        assert answers(llm, prompts) == expected
        assert served_by(llm).layer.usage["sparse"]


def test_short_prompts_are_left_to_vllm():
    prompts = texts(1500, 300, begin=20000)
    with engine(settings(min_tokens=1000)) as llm:
        seen = watched(llm)
        got = answers(llm, prompts)
    assert got == [Alone().answer(prompts[0]), Alone(None).answer(prompts[1])]
    assert {tokens for _, tokens, _ in seen} == {1500}


def test_half_precision():
    prompts = texts(1500, 777, begin=20000)
    _, rows = Alone(dtype=torch.bfloat16).answers(prompts)
    with engine(settings(), dtype="bfloat16") as llm:
        seen = watched(llm)
        answers(llm, prompts)
    alike = sum(seen[key] == row for key, row in rows.items())
    # Other kernels round otherwise, and rows that nearly tie fall the other way.
    assert set(seen) == set(rows)
    assert alike > 0.9 * len(rows)


def test_weights_that_are_loaded_again():
    prompts = texts(777, begin=20000)
    with engine(settings()) as llm:
        expected = answers(llm, prompts)
        llm.collective_rpc("reload_weights")
        llm.reset_prefix_cache()
        assert answers(llm, prompts) == expected
