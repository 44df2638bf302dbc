import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from seerattention.hosts.transformers import attach, attached, base_checksum, detach, new_gates
from seerattention.policies import TopK, select
from seerattention.rows import Rows
from seerattention.train import DistillConfig, Distiller, Packs, TextWindows

SMALL = {"block_size": 16, "q_sub_block": 8, "k_sub_block": 8}


def gates_of(model, **settings):
    torch.manual_seed(1)
    return new_gates(model, **{**SMALL, **settings})


def state_of(gates):
    return {name: value.clone() for name, value in gates.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_loss_falls_the_recall_rises_and_the_base_is_untouched(model, text):
    before = base_checksum(model)
    gates = gates_of(model, init="random")
    config = DistillConfig(steps=100, lr=1e-2)
    # Without gaps, so that losses of different steps compare.
    steps = list(Distiller(model, gates, TextWindows(text, 256), config, reach=256).run())
    assert [s.step for s in steps] == list(range(1, 101))
    assert np.mean([s.loss for s in steps[-10:]]) < 0.85 * np.mean([s.loss for s in steps[:10]])
    assert np.mean([s.recall for s in steps[-10:]]) > np.mean([s.recall for s in steps[:10]])
    assert base_checksum(model) == before
    assert all(p.grad is None for p in model.parameters())
    assert "attn_gate" not in str(model)


def test_gradients_equal_those_of_one_loss_over_all_layers(model, text):
    """Layer by layer is an order of computation, not another gradient."""
    from seerattention.hosts.transformers import intercept
    from seerattention.ops.pooled_attention import pooled_attention
    from seerattention.train.objectives.kl import KL
    from seerattention.train.target import counted

    batch = TextWindows(text, 256)
    gates = gates_of(model)
    config = DistillConfig(steps=1, objective="kl", target="max")
    trainer = Distiller(model, gates, batch, config, reach=256)
    trainer.accumulate(batch(0), 0.1)
    mine = {n: p.grad.clone() for n, p in gates.named_parameters()}
    gates.zero_grad()
    losses, by_layer = [], dict(gates.items())

    def collect(call):
        out, target, _ = pooled_attention(call.q, call.k, call.v, (16, 16), backend="reference")
        with torch.enable_grad():
            losses.append(
                KL()(*counted(target, by_layer[call.layer](call.q_nope, call.k_nope), (16, 16), 256))
            )
        return out

    with torch.no_grad(), intercept(model, collect):
        model.get_decoder()(torch.from_numpy(batch(0)), use_cache=False)
    sum(losses).backward()
    for name, parameter in gates.named_parameters():
        scale = parameter.grad.abs().max()
        assert float((parameter.grad - mine[name]).abs().max()) <= 64 * torch.finfo(torch.float32).eps * scale


def test_the_plan_of_memory_counts_the_rows_that_teach(model, text):
    """All of 170 blocks, 128 of more: the maps' rows, as wide as the sequence."""
    trainer = Distiller(model, gates_of(model, shares=False), TextWindows(text, 256), DistillConfig(steps=1))
    heads, found = trainer.gates.config.num_heads, {}
    for blocks in (170, 171):
        found[blocks] = trainer.memory(16 * blocks)["one layer's maps per sequence"]
    more = found[171] - found[170]
    # Less by 42 rows, at 32 bytes a cell, and the pools of a block of tokens more.
    assert -32 * heads * (170 * 170 - 171 * 128) <= more < -32 * heads * (170 * 170 - 171 * 128) // 2


@pytest.mark.parametrize("gate", [{}, {"per_kv_head": True}, {"phase": "both"}])
def test_a_long_sequence_teaches_by_a_run_of_rows(model, text, monkeypatch, gate):
    """Every layer by its own, at other places in every step; the model attends as it always does."""
    from seerattention.train import distiller, target

    monkeypatch.setattr(target, "PREFILL_ROWS", 4)
    taught, maps = [], []
    learn = distiller.learn

    def watched(gate, q, k, targets, *args, **kwargs):
        taught.append((kwargs["taught"].first, kwargs["taught"].num_queries))
        maps.append(targets["prefill"].shape[2:])
        whole = distiller.pooled_map(*qk.pop(), gate.block_size, **of_map)
        row = kwargs["taught"].first // 16
        assert torch.allclose(targets["prefill"], whole[:, :, row : row + 4, : row + 4], rtol=1e-4, atol=1e-6)
        return learn(gate, q, k, targets, *args, **kwargs)

    qk, made = [], distiller._with_targets
    of_map = {"pool": "mass", "per_kv_head": gate.get("per_kv_head", False)}

    def targets(gate, q, k, v, call, *args):
        qk.append((q, k))
        of_map["scale"] = call.scale
        return made(gate, q, k, v, call, *args)

    monkeypatch.setattr(distiller, "learn", watched)
    monkeypatch.setattr(distiller, "_with_targets", targets)
    gates = gates_of(model, **gate)
    steps = list(Distiller(model, gates, TextWindows(text, 256), DistillConfig(steps=3)).run())
    layers = len(dict(gates.items()))
    assert len(taught) == 3 * layers
    assert len(set(taught)) > 3
    assert all(queries == 64 and 64 <= first <= 192 for first, queries in taught)
    assert all(0 < step.recall <= 1 for step in steps)


def test_gates_with_one_score_per_kv_head_learn_too(model, text):
    gates = gates_of(model, per_kv_head=True)
    steps = list(Distiller(model, gates, TextWindows(text, 256), DistillConfig(steps=30, lr=5e-3)).run())
    assert np.mean([s.loss for s in steps[-5:]]) < np.mean([s.loss for s in steps[:5]])


def test_memory_does_not_grow_with_depth(model, text, monkeypatch):
    """Of all layers' score tensors, at most one layer's is alive at a time."""
    import weakref

    from seerattention.train import layer

    gates = gates_of(model)
    alive, most = [], 0

    original = layer.gate_scores

    def remember(*args):
        nonlocal most
        output = original(*args)
        alive.append(weakref.ref(output["prefill"]))
        most = max(most, sum(r() is not None for r in alive))
        return output

    monkeypatch.setattr(layer, "gate_scores", remember)
    list(Distiller(model, gates, TextWindows(text, 256), DistillConfig(steps=3)).run())
    assert len(alive) == 6
    # The previous call's tensor dies when the handler's frame is left, before the next layer's is made.
    assert most == 1


def test_a_stopped_run_continues_exactly(model, text, tmp_path):
    config = DistillConfig(steps=12, save_every=4)
    straight = gates_of(model)
    expected = [(s.loss, s.recall) for s in Distiller(model, straight, TextWindows(text, 128), config).run()]

    stopped = gates_of(model)
    for step in Distiller(model, stopped, TextWindows(text, 128), config, out=tmp_path).run():
        if step.step == 6:
            break
    resumed = gates_of(model)
    trainer = Distiller(model, resumed, TextWindows(text, 128), config, out=tmp_path)
    assert trainer.done == 4
    list(trainer.run())
    assert same(state_of(resumed), state_of(straight))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, 13))
    assert [(r["loss"], r["recall"]) for r in rows] == expected


KILLED = """
import signal, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
import numpy as np, torch
torch.set_num_threads(1)
from transformers import LlamaForCausalLM
from seerattention.train import DistillConfig, Distiller, TextWindows
from seerattention.hosts.transformers import new_gates
from seerattention.rows import Rows
model = LlamaForCausalLM.from_pretrained({base!r}).eval()
torch.manual_seed(1)
gates = new_gates(model, block_size=16, q_sub_block=8, k_sub_block=8)
text = np.load({text!r})
config = DistillConfig(steps=60, save_every=3)
trainer = Distiller(model, gates, TextWindows(text, 128), config, out=Path({out!r}))
print("from", trainer.done, flush=True)
last = trainer.done + {steps} + 8
for step in trainer.run():
    print(step.step, flush=True)
    if step.step == last:
        signal.pause()
"""


def test_a_killed_run_continues_bit_for_bit(model, text, tmp_path, capsys):
    """SIGKILL at random moments, then run to the end: the same gates as without.

    The run waits for it eight steps later, however late it comes.
    """
    base, words = tmp_path / "base", tmp_path / "text.npy"
    model.save_pretrained(base)
    np.save(words, text)
    seed = random.SystemRandom().randrange(10**6)
    rng = random.Random(seed)

    def script(name, steps=99):
        paths = {"folder": str(tmp_path), "base": str(base), "text": str(words), "out": str(tmp_path / name)}
        return KILLED.format(**paths, steps=steps)

    for kill in range(2):
        steps = rng.randrange(4, 20)
        with subprocess.Popen(
            [sys.executable, "-c", script("killed", steps)], stdout=subprocess.PIPE, text=True, cwd=tmp_path
        ) as run:
            assert run.stdout is not None
            first = run.stdout.readline().split()
            assert first[:1] == ["from"], f"seed {seed}"
            assert (int(first[1]) > 0) == (kill > 0), f"seed {seed}: did not start from a checkpoint"
            last = int(first[1]) + steps
            while int(run.stdout.readline()) < last:
                pass
            time.sleep(rng.random() * 0.05)
            os.kill(run.pid, signal.SIGKILL)
            run.stdout.read()
            code = run.wait()
        assert code == -signal.SIGKILL, f"seed {seed}"
    capsys.readouterr()
    exec(script("killed"), {})
    assert not capsys.readouterr().out.startswith("from 0"), f"seed {seed}"
    exec(script("straight"), {})
    assert capsys.readouterr().out.startswith("from 0")
    results = [load_file(tmp_path / name / "checkpoint.safetensors") for name in ("straight", "killed")]
    assert same(*results), f"seed {seed}"


def test_checkpoints_of_another_run_are_refused(model, text, tmp_path):
    config = DistillConfig(steps=2, save_every=1)
    list(Distiller(model, gates_of(model), TextWindows(text, 128), config, out=tmp_path).run())
    with pytest.raises(ValueError, match=r"another run, config\.steps differ"):
        Distiller(
            model, gates_of(model), TextWindows(text, 128), DistillConfig(steps=1, save_every=1), out=tmp_path
        )
    with pytest.raises(ValueError, match="another run, text differ"):
        Distiller(model, gates_of(model), TextWindows(text[::-1], 128), config, out=tmp_path)
    with pytest.raises(ValueError, match=r"another run, gate\.k_sub_block differ"):
        Distiller(model, gates_of(model, k_sub_block=16), TextWindows(text, 128), config, out=tmp_path)


def test_whatever_a_run_follows_from_is_compared_on_resuming(model, text, tmp_path):
    heldout, config = text[:128], DistillConfig(steps=2, save_every=1)

    def start(model=model, text=text, heldout=heldout, packed=False):
        batches = Packs([text, heldout], 128, 1, 64) if packed else TextWindows(text, 128)
        out = tmp_path / str(packed)
        return Distiller(model, gates_of(model), batches, config, out=out, heldout=[heldout])

    for packed in (False, True):
        next(start(packed=packed).run())
        assert start(packed=packed).done == 1
        changed = text.copy()
        changed[-1] += 1
        with pytest.raises(ValueError, match="another run, text differ"):
            start(text=changed, packed=packed)
    with pytest.raises(ValueError, match="another run, heldout differ"):
        start(heldout=text[1:129])
    with pytest.raises(ValueError, match="another run, base, dtype differ"):
        start(model=copy.deepcopy(model).bfloat16())
    flipped = copy.deepcopy(model)
    flipped.model.layers[1].mlp.up_proj.weight.data.view(torch.int32)[3, 5] ^= 1
    with pytest.raises(ValueError, match="another run, base differ"):
        start(model=flipped)


def test_a_finished_run_can_be_taught_further_and_an_unfinished_one_keeps_its_steps(model, text, tmp_path):
    def start(out, steps):
        config = DistillConfig(steps=steps, save_every=1)
        return Distiller(model, gates_of(model), TextWindows(text, 128), config, out=tmp_path / out)

    for stop in (4, 6):
        out = f"stopped at {stop}"
        list(start(out, 3).run())
        further = start(out, 6)
        assert further.done == 3
        for step in further.run():
            if step.step == stop:
                break
        resumed = start(out, 6)
        assert resumed.done == stop
        if stop < 6:
            with pytest.raises(ValueError, match=r"another run, config\.steps differ"):
                start(out, 7)
        list(resumed.run())
        rows = [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    ends = [load_file(tmp_path / f"stopped at {stop}" / "checkpoint.safetensors") for stop in (4, 6)]
    assert same(*ends)


def test_metrics_of_a_run_stopped_before_its_first_checkpoint_are_written_again(model, text, tmp_path):
    config = DistillConfig(steps=3, save_every=3)
    for _ in range(2):
        run = Distiller(model, gates_of(model), TextWindows(text, 128), config, out=tmp_path).run()
        for _ in range(2):
            next(run)
        run.close()
    list(Distiller(model, gates_of(model), TextWindows(text, 128), config, out=tmp_path).run())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]


@pytest.mark.parametrize("content", [b"[]\n", b'{"step": "x"}\n', b"{\n", b"{}\n", b"\xff\n"])
def test_damaged_metrics_are_refused_by_name(model, text, tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    trainer = Distiller(model, gates_of(model), TextWindows(text, 128), DistillConfig(steps=1), out=tmp_path)
    with pytest.raises(ValueError, match=r"/metrics\.jsonl is (damaged .* delete it|no text in UTF-8)"):
        next(trainer.run())


@pytest.mark.parametrize("what", ["weights", "state of the optimizer", "scores"])
def test_what_is_not_finite_is_never_saved(model, text, tmp_path, what):
    config = DistillConfig(steps=2, save_every=1)
    gates = gates_of(model)
    trainer = Distiller(model, gates, TextWindows(text, 128), config, out=tmp_path, heldout=[text[:128]])
    run = trainer.run()
    next(run)
    saved = (tmp_path / "checkpoint.safetensors").read_bytes()
    step = trainer.optimizer.step

    def poisoned():
        step()
        with torch.no_grad():
            parameter = next(gates.parameters())
            if what == "weights":
                parameter[0] = float("inf")
            elif what == "scores":
                parameter.fill_(3e38)
            else:
                trainer.optimizer.state[parameter]["exp_avg_sq"][0] = float("inf")

    trainer.optimizer.step = poisoned
    with pytest.raises(FloatingPointError, match=r"step 2 has made .*the checkpoint in .* is of step 1\."):
        next(run)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == saved


def test_a_checkpoint_that_no_run_can_go_on_from_is_refused(model, text, tmp_path):
    config, path = DistillConfig(steps=1), tmp_path / "checkpoint.safetensors"

    def start():
        batches = TextWindows(text, 128)
        return Distiller(model, gates_of(model), batches, config, out=tmp_path, heldout=[text[:128]])

    list(start().run())
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    whole, state = load_file(path), json.loads(metadata["state"])
    weight = next(name for name in whole if name.startswith("gates."))
    moment = f"optimizer.{weight}.exp_avg"
    for changes, words in (
        ({weight: torch.full_like(whole[weight], torch.nan)}, "is not finite"),
        ({moment: torch.full_like(whole[moment], torch.inf)}, "is not finite"),
        ({moment: whole[moment][:1].clone()}, "the optimizer's state for"),
        ({weight: None}, "it has no gates"),
        ({weight.replace("gates.", "best."): None}, "missing gate keys"),
        ({"state": {**state, "step": "one"}}, "step must be of type int"),
        ({"state": {**state, "best_recall": None}}, "best_recall must be of type float"),
        ({"state": {**state, "config": 3}}, "is truncated or damaged"),
        ({"state": [state]}, "is truncated or damaged"),
        ({"state": {**state, "format": 1}}, "another run, format differ"),
    ):
        told = json.dumps(changes.pop("state", state))
        tensors = {name: value for name, value in {**whole, **changes}.items() if value is not None}
        save_file(tensors, path, metadata={"state": told})
        with pytest.raises(ValueError, match=words):
            start()


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_damaged_checkpoint_is_refused_with_the_remedy(model, text, tmp_path, damage):
    config = DistillConfig(steps=1)
    list(Distiller(model, gates_of(model), TextWindows(text, 128), config, out=tmp_path).run())
    path = tmp_path / "checkpoint.safetensors"
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "garbage": b"x" * 100, "empty": b""}[damage])
    with pytest.raises(ValueError, match="truncated or damaged"):
        Distiller(model, gates_of(model), TextWindows(text, 128), config, out=tmp_path)


def test_a_loss_that_is_not_finite_stops_before_the_gates_change(model, text, tmp_path):
    gates = gates_of(model)
    config = DistillConfig(steps=10, save_every=1)
    trainer = Distiller(model, gates, TextWindows(text, 128), config, out=tmp_path)
    run = trainer.run()
    next(run)
    good, saved = state_of(gates), (tmp_path / "checkpoint.safetensors").read_bytes()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.fill_(float("nan"))
    with pytest.raises(
        FloatingPointError, match=r"step 2, on batch 1 of the text, has loss nan.*is of step 1"
    ):
        next(run)
    assert same(state_of(gates), good)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == saved


def test_a_full_disk_keeps_the_old_checkpoint(model, text, tmp_path, monkeypatch):
    from seerattention.train import checkpoint as module

    config = DistillConfig(steps=4, save_every=1)
    run = Distiller(model, gates_of(model), TextWindows(text, 128), config, out=tmp_path).run()
    next(run)
    saved = (tmp_path / "checkpoint.safetensors").read_bytes()

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        next(run)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == saved
    # No half file is left; tensorboard's folder is there where it is installed.
    left = {p.name for p in tmp_path.iterdir()} - {"tensorboard"}
    assert left == {"checkpoint.safetensors", "metrics.jsonl", "run.json"}


def test_trained_gates_choose_better_than_untrained_ones(model, text):
    """What is learned carries over to text that was not trained on."""
    from seerattention.hosts.transformers import intercept
    from seerattention.ops.pooled_attention import pooled_attention
    from seerattention.train import target_recall

    def recall(gates):
        found, by_layer = [], dict(gates.items())

        def look(call):
            out, target, _ = pooled_attention(call.q, call.k, call.v, (16, 16))
            scores = by_layer[call.layer](call.q_nope, call.k_nope)
            found.append(target_recall(target, scores, (16, 16), 512, 0.2))
            assert select(TopK(0.2), scores, rows=Rows.last(512, 512), block_size=(16, 16))
            return out

        with torch.no_grad(), intercept(model, look):
            model.get_decoder()(torch.from_numpy(text[-512:])[None], use_cache=False)
        return np.mean(found)

    gates = gates_of(model, init="random")
    before = recall(gates)
    config = DistillConfig(steps=60, lr=5e-3)
    list(Distiller(model, gates, TextWindows(text[:-512], 512), config).run())
    assert recall(gates) > before


@pytest.mark.parametrize("phase", ["prefill", "decode", "both"])
def test_documents_of_a_pack_learn_as_each_would_alone(model, text, phase):
    """Attention, blocks and positions restart at each document; the shortest is not learned from."""
    from seerattention.train import Packed

    lengths = (150, 40, 66)
    tokens = text[:256][None]
    gates = gates_of(model, phase=phase)
    trainer = Distiller(model, gates, lambda step: Packed(tokens, (lengths,)), DistillConfig(steps=1))
    values = trainer.accumulate(Packed(tokens, (lengths,)), 0.1)
    mine = {n: p.grad.clone() for n, p in gates.named_parameters()}
    expected, total = {}, torch.zeros(1 + len(gates.config.phases))
    for start, length in ((0, 150), (190, 66)):
        gates.zero_grad()
        share = length / 216
        total += share * trainer.accumulate(tokens[:, start : start + length], 0.1)
        for name, p in gates.named_parameters():
            expected[name] = expected.get(name, 0) + share * p.grad
    assert values.tolist() == pytest.approx(total.tolist(), rel=1e-5)
    for name, gradient in expected.items():
        eps = 256 * torch.finfo(torch.float32).eps
        assert float((gradient - mine[name]).abs().max()) <= eps * gradient.abs().max()


def test_training_stops_on_a_plateau_and_the_best_gates_are_kept(model, text):
    gates = gates_of(model)
    config = DistillConfig(steps=50, lr=1e-12, eval_every=2, patience=2)
    trainer = Distiller(model, gates, TextWindows(text, 128), config, heldout=[text[:256]])
    recalls = iter([0.5, 0.7, 0.6, 0.7])
    trainer.heldout_recall = lambda densities: {"prefill": [next(recalls)]}
    states = [state_of(gates) for _ in trainer.run()]
    assert len(states) == 8
    assert same(state_of(gates), states[3])


def test_patience_without_heldout_text_is_refused(model, text):
    with pytest.raises(ValueError, match="give held-out text"):
        Distiller(model, gates_of(model), TextWindows(text, 128), DistillConfig(patience=1))


def test_sequences_that_do_not_split_evenly_are_refused(model, text):
    trainer = Distiller(model, gates_of(model), TextWindows(text, 128, 3), DistillConfig(grad_accum=2))
    with pytest.raises(ValueError, match="3 sequences per step cannot be split evenly over 1 processes"):
        next(trainer.run())


def test_the_log_has_the_base_checksum_before_and_after_and_a_changed_base_is_an_error(model, text, tmp_path):
    config = DistillConfig(steps=2)
    run = Distiller(model, gates_of(model), TextWindows(text, 128), config, out=tmp_path).run()
    next(run)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1)
    with pytest.raises(RuntimeError, match="weights changed during training"):
        list(run)
    log = json.loads((tmp_path / "run.json").read_text())
    assert log["base_checksum_before"] != log["base_checksum_after"] == base_checksum(model)


@pytest.mark.parametrize("copied", [False, True])
def test_gates_that_were_attached_learn_as_others(model, text, copied):
    """Attached gates ask for no gradient; detached, copied or still attached they are taught all the same."""
    used, other = gates_of(model), gates_of(model)
    attach(model, used, "top_k:0.5", min_tokens=0)
    assert not any(p.requires_grad for p in used.parameters())
    taught = copy.deepcopy(used) if copied else used
    losses = []
    for gates in (taught, other):
        run = Distiller(model, gates, TextWindows(text, 128), DistillConfig(steps=3)).run()
        losses.append([step.loss for step in run])
        if attached(model):
            detach(model)
    assert losses[0] == losses[1]
    assert same(state_of(taught), state_of(other))


class Relaid(torch.nn.Module):
    """Lays its weights out anew in its first pass, as bitsandbytes does on a CPU."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())
        self.transposed = False

    def forward(self, x):
        if not self.transposed:
            self.weight, self.transposed = self.weight.T.contiguous(), True
        return x @ self.weight


def test_quantised_weights_that_are_laid_out_anew_are_no_changed_base(model, text, tmp_path):
    for layer in model.model.layers:
        layer.mlp.up_proj = Relaid(layer.mlp.up_proj)
    model.is_quantized = True
    config = DistillConfig(steps=1)
    list(Distiller(model, gates_of(model), TextWindows(text, 128), config, out=tmp_path).run())
    log = json.loads((tmp_path / "run.json").read_text())
    assert log["base_checksum_before"] == log["base_checksum_after"] == base_checksum(model)


@pytest.mark.parametrize("per_kv_head", [True, False])
def test_gates_learn_to_decode(model, text, per_kv_head):
    gates = gates_of(model, phase="decode", init="random", per_kv_head=per_kv_head)
    config = DistillConfig(steps=100, lr=1e-2)
    trainer = Distiller(model, gates, TextWindows(text[:-512], 256), config, heldout=[text[-256:]])
    before = trainer.heldout_recall((0.1,))
    steps = list(trainer.run())
    assert np.mean([s.loss for s in steps[-10:]]) < 0.9 * np.mean([s.loss for s in steps[:10]])
    assert steps[0].recall is steps[-1].heldout_recall is None
    assert list(before) == ["decode"]
    assert steps[-1].heldout_decode_recall > before["decode"][0]
    assert steps[-1].decode_recall > steps[0].decode_recall


def test_both_phases_are_reported_and_the_best_gates_are_the_best_in_their_mean(model, text):
    gates = gates_of(model, phase="both")
    config = DistillConfig(steps=6, lr=1e-12, eval_every=2)
    trainer = Distiller(model, gates, TextWindows(text, 128), config, heldout=[text[:256]])
    found = iter([(0.5, 0.5), (0.9, 0.2), (0.7, 0.3)])
    trainer.heldout_recall = lambda densities: {
        phase: [value] for phase, value in zip(("prefill", "decode"), next(found), strict=True)
    }
    states, steps = [], []
    for step in trainer.run():
        states.append(state_of(gates))
        steps.append(step)
    assert [s.heldout_recall for s in steps] == [None, 0.5, None, 0.9, None, 0.7]
    assert [s.heldout_decode_recall for s in steps] == [None, 0.5, None, 0.2, None, 0.3]
    assert all(0 < s.recall < 1 and 0 < s.decode_recall < 1 for s in steps)
    assert trainer.best == pytest.approx(0.55)
    assert same(state_of(gates), states[3])


@pytest.mark.parametrize("phase", ["decode", "both"])
def test_a_stopped_run_for_decoding_continues_exactly(model, text, tmp_path, phase):
    config, settings = DistillConfig(steps=6, save_every=2), {"phase": phase}

    def trainer(gates, out=None):
        return Distiller(model, gates, TextWindows(text, 128), config, out=out)

    straight, stopped, resumed = (gates_of(model, **settings) for _ in range(3))
    expected = list(trainer(straight).run())
    for step in trainer(stopped, tmp_path).run():
        if step.step == 3:
            break
    again = trainer(resumed, tmp_path)
    assert again.done == 2
    list(again.run())
    assert same(state_of(resumed), state_of(straight))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["decode_recall"] for row in rows] == [s.decode_recall for s in expected]
    with pytest.raises(ValueError, match=r"another run, .*gate\.phase differ"):
        trainer(gates_of(model), tmp_path)
