"""Gates are taught up to the model's own limit, by sequences whose positions have gaps."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config, PreTrainedConfig, Qwen2Config, Qwen3Config

from seerattention.train import (
    DistillConfig,
    Distiller,
    FinetuneConfig,
    Finetuner,
    Packed,
    TextWindows,
    prepare,
)
from seerattention.train import distiller as distiller_file
from seerattention.train.layer import gate_scores
from seerattention.train.positions import MOST_GAPS, Reach, gapped_positions
from seerattention.train.target import decode_rows, decode_target

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 64,
}
SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
PLAIN = LlamaConfig(**SMALL, max_position_embeddings=2048)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def gap_step(trainer, length):
    """Let the step that comes be one whose positions have gaps, and return these."""
    block = trainer.gates.config.block_size
    for trainer.done in range(50):
        positions = trainer.reach.positions(trainer.seed, trainer.index, length, block)
        if int(positions[-1]) >= length:
            return positions
    raise AssertionError("no step has gaps")


@given(
    st.integers(0, 2**40), st.integers(0, 10**6), st.integers(1, 700), st.integers(0, 9000),
    st.sampled_from([1, 16, 64]),
)  # fmt: skip
def test_blocks_stay_together_and_positions_below_the_limit(seed, step, length, more, block):
    positions = gapped_positions(seed, step, length, length + more, block)
    assert positions.dtype == torch.int64
    assert positions.shape == (length,)
    assert positions[0] == 0
    assert positions[-1] < length + more
    gaps = positions.diff() - 1
    at = gaps.nonzero()[:, 0] + 1
    assert (gaps >= 0).all()
    assert not (at % block).any()
    assert not (gaps % block).any()
    assert len(at) <= MOST_GAPS
    assert torch.equal(positions, gapped_positions(seed, step, length, length + more, block))


def test_seven_steps_in_ten_have_gaps_and_all_positions_are_met():
    found = [gapped_positions(3, step, 256, 4096, 16) for step in range(1000)]
    left_out = np.array([int(p[-1]) - 255 for p in found])
    assert 0.65 < (left_out > 0).mean() < 0.75
    counts = [int((p.diff() > 1).sum()) for p in found]
    # None, or up to one at every bound of 16 blocks.
    assert set(counts) == set(range(16))
    met = np.histogram(np.concatenate([p.numpy() for p in found]), 16, (0, 4096))[0]
    # The first tokens are those of every step; no later part is met half as often as another.
    assert met[1:].min() > 0.5 * met[1:].max()
    other = [gapped_positions(4, step, 256, 4096, 16) for step in range(20)]
    assert any(not torch.equal(a, b) for a, b in zip(found, other, strict=False))


@pytest.mark.parametrize(("length", "limit", "block"), [(256, 256, 16), (256, 271, 16), (16, 4096, 16)])
def test_without_room_or_bounds_there_are_no_gaps(length, limit, block):
    for step in range(20):
        assert torch.equal(gapped_positions(0, step, length, limit, block), torch.arange(length))


@pytest.mark.parametrize(
    ("config", "reach", "said"),
    [
        (PLAIN, 2048, "taught up to 2,048 of the model's 2,048: in 70% of the steps there are gaps"),
        (LlamaConfig(**SMALL, max_position_embeddings=256), 256, "taught up to 256 of the model's 256"),
        (LlamaConfig(**SMALL, max_position_embeddings=128), 256, "taught up to 256 past the model's 128"),
        (
            Qwen2Config(**SMALL, max_position_embeddings=512, rope_parameters=YARN),
            2048,
            "taught up to 2,048 of the model's 2,048: in 70%",
        ),
        (
            Qwen3Config(**SMALL, max_position_embeddings=4096, rope_parameters=YARN | {"factor": 8.0}),
            4096,
            "taught up to 4,096 of the model's 4,096: in 70%",
        ),
        (
            LlamaConfig(**SMALL, max_position_embeddings=1024, rope_parameters=LLAMA3),
            1024,
            "taught up to 1,024 of the model's 1,024: in 70%",
        ),
        (
            LlamaConfig(
                **SMALL,
                max_position_embeddings=1024,
                rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
            ),
            1024,
            "taught up to 1,024 of the model's 1,024: in 70%",
        ),
        (
            LlamaConfig(
                **SMALL,
                max_position_embeddings=1024,
                rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
            ),
            256,
            "taught up to 256 of the model's 1,024: RoPE of type dynamic turns a text by its length, which "
            "gaps would pretend; longer sequences teach further",
        ),
        (
            Phi3Config(
                **SMALL,
                max_position_embeddings=1024,
                rope_parameters=LONG,
                original_max_position_embeddings=64,
                pad_token_id=0,
            ),
            256,
            "RoPE of type longrope turns a text by its length",
        ),
        (
            Gemma3TextConfig(**SMALL, max_position_embeddings=1024, sliding_window=24),
            256,
            "taught up to 256 of the model's 1,024: sliding windows count tokens, and across a gap would see "
            "distances that they never learned; longer sequences teach further",
        ),
    ],
    ids=[
        "plain",
        "its limit",
        "past it",
        "yarn",
        "yarn told",
        "llama3",
        "linear",
        "dynamic",
        "long",
        "windows",
    ],
)
def test_gates_are_taught_as_far_as_the_model_reads_where_positions_can_have_gaps(config, reach, said):
    found = Reach.of(config, 256)
    assert found.tokens == reach
    assert said in str(found)
    assert found.has_gaps == ("gaps between" in str(found))
    assert Reach.of(config, 256, 256).tokens == 256
    assert not Reach.of(config, 256, 256).has_gaps


def test_a_model_without_a_limit_is_taught_as_far_as_is_asked():
    config = PreTrainedConfig()
    assert str(Reach.of(config, 256)) == "taught up to 256; the model's configuration names no limit"
    assert Reach.of(config, 256, 4096).tokens == 4096


@pytest.mark.parametrize(
    ("config", "asked", "words"),
    [
        (PLAIN, 128, "a reach of 128 is below the length of the sequences, 256 tokens; give that or more"),
        (PLAIN, 2049, "a reach of 2,049 is past the model's limit of 2,048 positions; give that or less"),
        (
            Gemma3TextConfig(**SMALL, max_position_embeddings=1024, sliding_window=24),
            512,
            "a reach of 512 needs sequences of as many tokens, since sliding windows count tokens, and "
            "across a gap would see distances that they never learned; give that length, or leave reach out",
        ),
    ],
)
def test_a_reach_that_cannot_be_had_is_refused(config, asked, words):
    with pytest.raises(ValueError, match=words):
        Reach.of(config, 256, asked)


def captured(monkeypatch, trainer, batch):
    """What a step's layers learn from: q and k before RoPE, targets, positions and scores."""
    found, own = [], distiller_file.learn

    def look(gate, q, k, targets, objective, **options):
        values, scores = own(gate, q, k, targets, objective, **options)
        found.append((gate, q, k, targets, options["positions"], scores))
        return values, scores

    monkeypatch.setattr(distiller_file, "learn", look)
    trainer.accumulate(batch, 0.1)
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@torch.no_grad()
def test_model_and_gates_see_the_same_gaps(tiny, text, monkeypatch, kind):
    """Targets are those of the model's own eager attention at these positions, scores those of its gates."""
    length, model = 150, tiny.make(kind, max_position_embeddings=2048)
    gates, batches = tiny.gates_of(model, phase="both"), TextWindows(text, length, 2)
    trainer = Distiller(model, gates, batches, DistillConfig(steps=1, target="max"))
    assert trainer.reach.tokens == 2048
    positions, states, own = gap_step(trainer, length), [], trainer.decoder
    trainer.decoder = lambda *args, **more: states.append(own(*args, **more).last_hidden_state)
    batch = batches(trainer.done)
    layers = captured(monkeypatch, trainer, batch)

    model.set_attn_implementation("eager")
    asked = {"position_ids": positions[None], "attention_mask": torch.ones(2, length, dtype=torch.long)}
    plain = model.get_decoder()(torch.from_numpy(batch), output_attentions=True, use_cache=False, **asked)
    assert torch.allclose(states[0], plain.last_hidden_state, atol=1e-5)
    without = model.get_decoder()(torch.from_numpy(batch), use_cache=False).last_hidden_state
    assert not torch.allclose(states[0], without, atol=1e-2)
    rows = decode_rows(length)
    for (gate, q, k, targets, told, scores), weights in zip(layers, plain.attentions, strict=True):
        blocks = (
            torch.nn.functional.pad(weights, (0, 10, 0, 10)).unflatten(3, (10, 16)).unflatten(2, (10, 16))
        )
        largest = blocks.amax((3, 5))
        expected = largest / largest.sum(-1, keepdim=True)
        assert torch.allclose(targets["prefill"], expected, atol=1e-4)
        finished = torch.arange(1, 11) * 16 <= rows[:, None] + 1
        largest = blocks.amax(5).flatten(2, 3)[:, :, rows].unflatten(1, (2, 2)).amax(2) * finished
        assert torch.allclose(targets["decode"], largest / largest.sum(-1, keepdim=True), atol=1e-4)
        assert torch.equal(told, positions)
        seen = torch.ones(10, 10).tril().bool()
        mine, away = (gate(q, k, positions=at)[:, :, seen] for at in (positions, torch.arange(length)))
        assert torch.allclose(scores["prefill"][:, :, seen], mine, atol=1e-4)
        assert not torch.allclose(mine, away, atol=1e-2)
        single = gate.per_token()
        alone = single.score(
            q[:, :, rows[-1:]], gate.compress(k, positions=positions), positions=positions[rows[-1:]]
        )
        share = alone[:, :, 0, :9].softmax(-1).unflatten(1, (2, 2)).amax(2).log()
        assert torch.allclose(scores["decode"][:, :, -1, :9].softmax(-1), share.softmax(-1), atol=1e-4)
    assert decode_target(q, k, rows, 16, scale=0.25).shape == targets["decode"].shape


def test_documents_of_a_pack_have_gaps_of_their_own(tiny, text):
    model, asked = tiny.make(max_position_embeddings=2048), []
    batch = Packed(text[:256][None], ((150, 40, 66),))
    trainer = Distiller(model, tiny.gates_of(model), lambda step: batch, DistillConfig(steps=1))
    gap_step(trainer, 150)
    own = trainer.decoder
    trainer.decoder = lambda *args, **more: asked.append(more) or own(*args, **more)
    trainer.accumulate(batch, 0.1)
    assert asked[0]["attention_mask"].all()
    parts = asked[0]["position_ids"][0].split((150, 40, 66))
    assert [int(part[0]) for part in parts] == [0, 0, 0]
    for part in parts:
        expected = trainer.reach.positions(0, trainer.index, len(part), 16)
        assert torch.equal(part, expected)
        assert len(part) < int(part[-1]) < 2048


def test_recall_on_heldout_text_is_measured_without_gaps(tiny, text):
    model, found = tiny.make(max_position_embeddings=2048), []
    for reach in (None, 128):
        config = {"reach": reach, "heldout": [text[:128], text[128:256]]}
        trainer = Distiller(
            model, tiny.gates_of(model), TextWindows(text, 128), DistillConfig(steps=2), **config
        )
        if trainer.reach.has_gaps:
            gap_step(trainer, 128)
        found.append(trainer.heldout_recall((0.3,)))
    assert found[0] == found[1]


def test_a_stopped_run_with_gaps_continues_exactly_and_says_how_far_it_taught(tiny, text, tmp_path):
    model, config = tiny.make(max_position_embeddings=2048), DistillConfig(steps=6, save_every=2)

    def run(out=None, **more):
        gates = tiny.gates_of(model)
        return gates, Distiller(model, gates, TextWindows(text, 128), config, out=out, **more)

    straight, trainer = run()
    assert straight.reach is None
    losses = [step.loss for step in trainer.run()]
    assert straight.reach == 2048
    for step in run(tmp_path)[1].run():
        if step.step == 3:
            break
    resumed, trainer = run(tmp_path)
    assert trainer.done == 2
    assert [step.loss for step in trainer.run()] == losses[2:]
    assert same(resumed.state_dict(), straight.state_dict())
    short, trainer = run(reach=128)
    list(trainer.run())
    assert short.reach == 128
    assert not same(short.state_dict(), straight.state_dict())
    said = json.loads((tmp_path / "run.json").read_text())
    assert (said["reach"], said["seed"]) == (2048, 0)
    with pytest.raises(ValueError, match="is of another run, seed differ"):
        run(tmp_path, seed=1)
    with pytest.raises(ValueError, match="is of another run, reach, seed differ"):
        run(tmp_path, reach=1024, seed=1)
    with pytest.raises(ValueError, match="is of another run, reach differ"):
        run(tmp_path, reach=1024)


def test_every_step_has_the_positions_of_its_number_and_of_the_seed(tiny, text, tmp_path):
    model, config = tiny.make(max_position_embeddings=2048), DistillConfig(steps=8, save_every=1)
    found = []

    def run():
        batches = TextWindows(text, 128)
        trainer = Distiller(model, tiny.gates_of(model), batches, config, out=tmp_path, seed=7)
        own = trainer.decoder
        trainer.decoder = lambda *args, **more: found.append(more.get("position_ids")) or own(*args, **more)
        yield from trainer.run()

    for step in run():
        if step.step == 4:
            break
    assert len(list(run())) == 4
    expected = [gapped_positions(7, step, 128, 2048, 16) for step in range(8)]
    assert {int(p[-1]) > 127 for p in expected} == {False, True}
    plain = torch.arange(128)[None]
    for asked, positions in zip(found, expected, strict=True):
        assert torch.equal(plain if asked is None else asked, positions[None])


def test_a_run_from_before_there_were_gaps_goes_on_without_and_not_with(tiny, text, tmp_path):
    model, config = tiny.make(max_position_embeddings=2048), DistillConfig(steps=4, save_every=1)

    def run(out=None, **more):
        gates = tiny.gates_of(model)
        return gates, Distiller(model, gates, TextWindows(text, 128), config, out=out, **more)

    next(run(tmp_path, reach=128)[1].run())
    path = tmp_path / "checkpoint.safetensors"
    with safe_open(path, "pt") as file:
        state = json.loads(file.metadata()["state"])
    for name in ("reach", "seed"):
        assert state.pop(name) is None
    save_file(load_file(path), path, metadata={"state": json.dumps(state)})
    with pytest.raises(ValueError, match="is of another run, reach, seed differ"):
        run(tmp_path)
    gates, trainer = run(tmp_path, reach=128)
    assert trainer.done == 1
    list(trainer.run())
    straight, trainer = run(reach=128)
    list(trainer.run())
    assert same(gates.state_dict(), straight.state_dict())


def test_joint_steps_have_no_gaps_nor_has_their_warm_up(tiny, text):
    model = tiny.make(max_position_embeddings=2048)
    gates = tiny.gates_of(model)
    gates.reach = 2048
    config = FinetuneConfig(steps=1, warmup_gate_steps=1)
    tuner = Finetuner(prepare(model), gates, TextWindows(text, 128), config)
    assert not tuner.warm_up().reach.has_gaps
    list(tuner.run())
    assert gates.reach == 128


def test_gates_that_do_not_learn_keep_their_reach(tiny, text):
    model = tiny.make(max_position_embeddings=2048)
    gates = tiny.gates_of(model)
    gates.reach = 2048
    config = FinetuneConfig(steps=1, gate_weight=0.0)
    list(Finetuner(prepare(model), gates, TextWindows(text, 128), config).run())
    assert gates.reach == 2048


def test_a_step_without_gaps_is_the_one_it_was(tiny, text, monkeypatch):
    """No positions are given to the decoder where they are 0, 1, 2, ..."""
    model = tiny.make(max_position_embeddings=2048)
    batches, asked = TextWindows(text, 128), []
    trainer = Distiller(model, tiny.gates_of(model), batches, DistillConfig(steps=1), reach=128)
    own = trainer.decoder
    trainer.decoder = lambda *args, **more: asked.append(more) or own(*args, **more)
    for gate, q, k, _, positions, scores in captured(monkeypatch, trainer, batches(0)):
        assert torch.equal(positions, torch.arange(128))
        assert torch.equal(scores["prefill"], gate_scores(gate, q, k, positions)["prefill"])
    assert asked == [{"use_cache": False}]


def test_batches_of_several_lengths_say_the_longest(tiny, text):
    model = tiny.make(max_position_embeddings=512)

    class Several:
        length = 512

        def __call__(self, step):
            return TextWindows(text, (128, 512)[step % 2])(step)

    gates = tiny.gates_of(model)
    trainer = Distiller(model, gates, Several(), DistillConfig(steps=1))
    assert not trainer.reach.has_gaps
    list(trainer.run())
    assert gates.reach == 512
    model.config.max_position_embeddings = 2048
    trainer = Distiller(model, tiny.gates_of(model), Several(), DistillConfig(steps=1))
    assert trainer.reach.tokens == 2048
    for length in (128, 512):
        assert int(gap_step(trainer, length)[-1]) < 2048
