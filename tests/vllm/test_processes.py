"""Heads, or layers, spread over two processes."""

import pytest
from prometheus_client import REGISTRY

from seerattention.hosts.vllm.served import served_in
from tests.vllm.engines import Alone, Chosen, answers, engine, settings, texts

RANKS = 2


def watch(worker):
    """Watch what a worker chooses."""
    served_in(worker.vllm_config).observe = Chosen()


def seen_by(worker):
    """What it chose, and of how many heads."""
    served = served_in(worker.vllm_config)
    (heads,) = {gate.config.num_heads for gate in served.gates.values()}
    return served.observe.taken(), heads


def counted_by(worker):
    """How many tokens it counted in the first layer."""
    labels = {"layer": "0", "attention": "sparse"}
    return REGISTRY.get_sample_value("seerattention_prompt_tokens_total", labels) or 0


@pytest.fixture(autouse=True)
def _functions_travel(monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")


def test_every_process_chooses_for_its_heads():
    prompts = texts(1500, 777, 65, begin=20000)
    expected, rows = Alone().answers(prompts)
    with engine(settings(), tensor_parallel_size=RANKS) as llm:
        llm.collective_rpc(watch)
        assert answers(llm, prompts) == expected
        found = llm.collective_rpc(seen_by)
        counted = llm.collective_rpc(counted_by)
    # What both compute is counted once.
    assert sorted(counted) == [0, sum(map(len, prompts))]
    assert len(found) == RANKS
    for rank, (seen, heads) in enumerate(found):
        assert seen == {key: row[rank * heads : (rank + 1) * heads] for key, row in rows.items()}


def test_every_process_computes_its_layers():
    """Compiled, since vLLM 0.32's pipeline of eager models breaks on a CPU; attention stays outside."""
    prompts = texts(1500, 65, begin=20000)
    expected, rows = Alone().answers(prompts)
    with engine(settings(), pipeline_parallel_size=RANKS, enforce_eager=False) as llm:
        llm.collective_rpc(watch)
        assert answers(llm, prompts) == expected
        parts = [seen for seen, _ in llm.collective_rpc(seen_by)]
    assert all(parts)
    assert not parts[0].keys() & parts[1].keys()
    assert parts[0] | parts[1] == rows
