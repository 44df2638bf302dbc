"""What a run of several processes refuses, and how it compares."""

import pytest
import torch
from torch import distributed as dist

from seerattention.bench import parallel
from seerattention.bench.models import random_config, random_model
from seerattention.bench.parallel import ParallelPlan

GIVEN = {"heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "float32", "device": "cpu"}


@pytest.fixture
def alone(tmp_path):
    """One process of one."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"processes": (1, 2)},
            "2 processes are to share a prompt and 1 were started; start more by torchrun",
        ),
        ({"shape": "llama-9b"}, "shape must be one of llama-8b, small, got 'llama-9b'"),
        ({"tokens": (0,)}, "tokens must be a whole number >= 1, got 0"),
        ({"policy": "top_q:0.1"}, "top_q"),
    ],
)
def test_plans_that_cannot_be_run(alone, changes, said):
    with pytest.raises(ValueError, match=said):
        ParallelPlan(**{"tokens": (64,), "processes": (1,), "shape": "small", **GIVEN, **changes})


def test_processes_are_compared_with_the_fewest_that_do_the_same():
    def row(tokens, processes, way, seconds):
        return {"tokens": tokens, "processes": processes, "way": way, "seconds": seconds}

    tokens = [
        row(10, 1, "gates", 4.0),
        row(10, 1, "dense", 9.0),
        row(10, 4, "gates", 2.0),
        row(10, 4, "dense", 3.0),
        row(99, 2, "gates", 5.0),
        row(99, 4, "gates", 2.5),
    ]
    parallel._compare({"layers": [], "first_tokens": tokens})
    assert [one["speedup"] for one in tokens] == [1, 1, 2, 3, 1, 2]
    assert [one["efficiency"] for one in tokens] == [1, 1, 0.5, 0.75, 1, 1]


def test_models_of_a_shape_are_alike():
    first, second = (random_model(random_config("small", 100, 1), "cpu", torch.float32) for _ in range(2))
    assert first.config.num_hidden_layers == 1
    weights = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    with pytest.raises(ValueError, match="shape must be one of llama-8b, small, got 'tiny'"):
        random_config("tiny")
