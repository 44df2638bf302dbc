"""CONTRIBUTING.md's recipes, done: each test adds one thing as one new file and uses it."""

import importlib
import json
import sys
import textwrap

import pytest
import torch
from typer.testing import CliRunner

from seerattention import baselines, cli, policies
from seerattention.attention import seer_attention
from seerattention.evals import tasks
from seerattention.gate import AttnGate, GateConfig
from seerattention.ops import block_sparse_attention as op
from seerattention.ops.dispatch import load_backends
from seerattention.ops.shapes import Shape
from seerattention.policies import TopK
from seerattention.rows import Rows
from seerattention.selection import BlockSelection
from seerattention.testing.inputs import random_qkv, random_selection
from seerattention.train import objectives


def shape(tokens, head_dim):
    return Shape(
        name="", heads=2, kv_heads=1, queries=tokens, keys=tokens, head_dim=head_dim, block_size=(16, 16)
    )


@pytest.fixture
def add(tmp_path, monkeypatch):
    """Write a file that a package finds in its folder, without touching the source tree."""
    added = []

    def write(package, name, text):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
        importlib.invalidate_caches()
        added.append((package, name))

    yield write
    for package, name in added:
        sys.modules.pop(f"{package.__name__}.{name}", None)
        vars(package).pop(name, None)


def test_a_backend_is_one_file(add, monkeypatch):
    add(
        op,
        "doubled",
        """
        from seerattention.ops.block_sparse_attention import reference

        def unsupported(q, k, v, selection, options):
            return [] if q.shape[3] == 32 else [f"it needs head_dim 32, not {q.shape[3]}"]

        def run(q, k, v, selection, options):
            out, lse = reference.run(q, k, v, selection, options)
            return 2 * out, lse
        """,
    )
    monkeypatch.setattr(op, "BACKENDS", load_backends(op.__name__, op.__path__))
    q, k, v = random_qkv(shape(100, 32))
    selection = random_selection(shape(100, 32), density=0.5)
    plain = op.block_sparse_attention(q, k, v, selection, backend="reference")
    assert torch.equal(op.block_sparse_attention(q, k, v, selection, backend="doubled"), 2 * plain)
    q, k, v = random_qkv(shape(100, 64))
    with pytest.raises(NotImplementedError, match="it needs head_dim 32, not 64"):
        op.block_sparse_attention(q, k, v, selection, backend="doubled")
    # `auto` is the op's choice, and a new file does not change it.
    assert torch.equal(
        op.block_sparse_attention(q, k, v, selection),
        op.block_sparse_attention(q, k, v, selection, backend="gather"),
    )


def test_a_policy_is_one_file_and_one_export(add, monkeypatch):
    add(
        policies,
        "every_nth",
        """
        from dataclasses import dataclass
        from typing import ClassVar

        import torch

        from seerattention.policies import Policy

        @dataclass(frozen=True)
        class EveryNth(Policy):
            name: ClassVar[str] = "every_nth"
            n: int

            def choose(self, scores, valid, block_tokens):
                return (torch.arange(scores.shape[-1]) % self.n == 0).expand_as(scores)
        """,
    )
    kind = importlib.import_module("seerattention.policies.every_nth").EveryNth
    with pytest.raises(ValueError, match="unknown policy 'every_nth:3'"):
        policies.parse("every_nth:3")
    monkeypatch.setattr(policies, "EveryNth", kind, raising=False)
    policy = policies.parse("every_nth:3,dense_last_rows=1")
    assert policy == kind(3, dense_last_rows=1)
    assert str(policy) == "every_nth:3,dense_last_rows=1"
    scores = torch.randn(1, 1, 8, 8)
    mask = policies.select(policy, scores, rows=Rows.last(64, 64), block_size=(8, 8)).to_mask()
    assert mask[0, 0, 5].nonzero().flatten().tolist() == [0, 3, 5]
    assert mask[0, 0, 7].all()


def test_a_baseline_is_one_file(add):
    add(
        baselines,
        "latest",
        """
        from dataclasses import dataclass

        import torch

        @dataclass(frozen=True)
        class Latest:
            block_size: tuple = (16, 16)
            after_rope = True
            tokens_per_summary = 1

            def compress(self, k, *, positions):
                return k[..., :1]

            def score(self, q, k_blocks, *, positions, valid):
                return torch.arange(valid.shape[1]).float().expand(q.shape[0], 1, *valid.shape)

        create = Latest
        """,
    )
    assert "latest" in baselines.names()
    scorer = baselines.create("latest")
    q, k, v = random_qkv(shape(128, 32))
    positions = torch.arange(128)
    out, selection = seer_attention(
        q,
        k,
        v,
        scorer,
        TopK(0.5),
        q_scored=q,
        k_blocks=scorer.compress(k, positions=positions),
        positions=positions,
    )
    assert out.shape == q.shape
    assert isinstance(selection, BlockSelection)
    # k = floor((1 - sqrt(0.5)) * 8) = 2: the latest two blocks.
    assert selection.to_mask()[0, 0, 5].nonzero().flatten().tolist() == [4, 5]


def test_an_objective_is_one_file(add):
    add(
        objectives,
        "difference",
        """
        def create():
            return lambda target, scores, valid: (scores.softmax(-1) - target).square().sum()
        """,
    )
    assert "difference" in objectives.names()
    target = torch.eye(4)[None, None]
    assert (
        objectives.create("difference")(target, torch.zeros(1, 1, 4, 4), torch.ones(4, 4).tril().bool()) == 3
    )


def test_a_task_is_one_file(add, tmp_path):
    add(
        tasks,
        "echo",
        """
        from dataclasses import dataclass

        from seerattention.evals.tasks._base import Generated, Sample, rng_of

        @dataclass(frozen=True)
        class Echo(Generated):
            word: str = "dog"

            def make(self, source, length, seed):
                start = int(rng_of("echo", length, seed).integers(0, 100))
                prompt = source.haystack[start : start + length - self.new_tokens]
                return Sample(prompt, (self.word,), new_tokens=self.new_tokens)

        create = Echo
        """,
    )
    assert "echo" in tasks.names()
    config = tmp_path / "echo.toml"
    config.write_text(
        f'out = "{tmp_path}/out"\nlengths = [128]\nsamples = 2\nmodel = {{ device = "cpu" }}\n'
        '[methods.meanpool]\npolicy = "token_budget:64"\n[tasks.echo]\nword = "the"\n'
    )
    result = CliRunner().invoke(cli.app(), ["eval", str(config)])
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [(r["method"], r["tokens"], r["expected"]) for r in records] == [
        (method, 96, ["the"]) for method in ("dense", "dense", "meanpool", "meanpool")
    ]
    assert all(r["score"] == float("the" in r["answer"].lower()) for r in records)


def test_a_command_is_one_file(add):
    add(
        cli,
        "greet",
        '''
        def run(name: str, loud: bool = False) -> None:
            """Greet somebody."""
            if name == "nobody":
                raise ValueError("name must be somebody, got 'nobody'")
            print(name.upper() if loud else name)
        ''',
    )
    runner = CliRunner()
    assert "Greet somebody." in runner.invoke(cli.app(), ["--help"]).output
    assert runner.invoke(cli.app(), ["greet", "you", "--loud"]).output == "YOU\n"
    refused = runner.invoke(cli.app(), ["greet", "nobody"])
    assert refused.exit_code == 2
    assert refused.output == "error: name must be somebody, got 'nobody'\n"


def test_a_gate_works_in_place_of_any_baseline():
    """The comparison of methods differs in one object."""
    torch.manual_seed(0)
    gate = AttnGate(GateConfig(2, 1, 32, block_size=16, q_sub_block=8, k_sub_block=8))
    q, k, v = random_qkv(shape(128, 32))
    positions = torch.arange(128)
    for scorer in (gate, *(baselines.create(n, block_size=(16, 16)) for n in baselines.names())):
        with torch.inference_mode():
            out, _ = seer_attention(
                q,
                k,
                v,
                scorer,
                TopK(0.5),
                q_scored=q,
                k_blocks=scorer.compress(k, positions=positions),
                positions=positions,
            )
        assert bool(torch.isfinite(out).all())
