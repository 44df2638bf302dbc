"""Runs of joint training: exact resuming, what is trained and what is frozen, what is refused."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from seerattention.hosts.transformers import attach, base_checksum, detach, load_gates
from seerattention.hosts.transformers.base import unwrapped
from seerattention.train import (
    FinetuneConfig,
    Finetuner,
    TextWindows,
    checkpoint_layers,
    extend_context,
    prepare,
    save_finetuned,
)

#: What peft still calls in transformers.
peft_is_behind = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")

SHORT = {"steps": 6, "lr": 1e-3, "density": (0.6, 0.9), "dense_share": 0.5, "save_every": 2}


def state_of(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@peft_is_behind
@pytest.mark.parametrize("lora", [0, 2])
def test_a_stopped_run_continues_bit_for_bit(tiny, text, tmp_path, lora):
    """Dropout, drawn densities, optimizer and warm-up included: stopped in the warm-up and after a save."""
    config = FinetuneConfig(**SHORT, warmup_gate_steps=3, soft_gates=not lora)

    def start(out):
        model = tiny.make(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
        gates = tiny.gates_of(model)
        torch.manual_seed(2)
        prepared = prepare(model, lora=lora)
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda m, a, y: torch.nn.functional.dropout(y, 0.1, m.training))
        return Finetuner(prepared, gates, TextWindows(text, 96, 2), config, out=out)

    straight = start(tmp_path / "straight")
    expected = list(straight.run())
    assert len({s.density for s in expected}) == 6

    stopped = start(tmp_path / "stopped").warm_up()
    for step in stopped.run():
        if step.step == 2:
            break
    torch.manual_seed(99)
    again = start(tmp_path / "stopped")
    assert again.warm_up().done == 2
    for step in again.run():
        if step.step == 5:
            break
    resumed = start(tmp_path / "stopped")
    assert resumed.done == 4
    assert resumed.warm_up() is None
    list(resumed.run())
    assert same(state_of(resumed.model), state_of(straight.model))
    assert same(state_of(resumed.gates), state_of(straight.gates))
    assert not same(state_of(straight.model), state_of(start(None).model))
    rows = [json.loads(line) for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, 7))
    assert [(r["loss"], r["gate_loss"], r["density"]) for r in rows] == [
        (s.loss, s.gate_loss, s.density) for s in expected
    ]


def test_the_language_loss_falls_through_selected_blocks(tiny, model, text):
    config = FinetuneConfig(steps=30, lr=3e-3, density=(0.8, 0.8))
    steps = list(Finetuner(prepare(model), tiny.gates_of(model), TextWindows(text, 128), config).run())
    assert sum(s.loss for s in steps[-5:]) < 0.9 * sum(s.loss for s in steps[:5])
    assert sum(s.gate_loss for s in steps) > 0


@peft_is_behind
def test_gates_only_leaves_every_weight_and_lora_the_base(tiny, text):
    batches = TextWindows(text, 96)
    for how in ({"gates_only": True}, {"lora": 2}):
        model = tiny.make()
        gates, before = tiny.gates_of(model), base_checksum(model)
        start = state_of(gates)
        tuner = Finetuner(prepare(model, **how), gates, batches, FinetuneConfig(steps=2, lr=1e-2))
        list(tuner.run())
        assert base_checksum(unwrapped(tuner.wrapped)) == before
        assert not same(state_of(gates), start)
        moved = [bool(p.any()) for n, p in tuner.named.items() if "lora_B" in n]
        assert moved == [True] * (14 if "lora" in how else 0)


def test_warming_up_gates_leaves_the_model_and_its_text_is_not_read_again(tiny, model, text):
    asked = []

    class Recorded(TextWindows):
        def __call__(self, step):
            asked.append(step)
            return super().__call__(step)

    gates, before = tiny.gates_of(model), base_checksum(model)
    config = FinetuneConfig(steps=2, warmup_gate_steps=2, target="mass")
    tuner = Finetuner(prepare(model), gates, Recorded(text, 96), config)
    assert tuner.warm_up().config.target == "mass"
    start = state_of(gates)
    list(tuner.warm_up().run())
    assert base_checksum(model) == before
    assert not same(state_of(gates), start)
    list(tuner.run())
    assert asked == [0, 1, 2, 3]


@peft_is_behind
@pytest.mark.parametrize("lora", [0, 2])
def test_the_saved_model_loads_in_plain_transformers_with_its_outputs_and_its_gates(
    tiny, text, tmp_path, lora
):
    config = tiny.make("qwen3").config
    model = type(tiny.make("qwen3"))(extend_context(config, "yarn", 4, 1024)).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    gates = tiny.gates_of(model)
    config = FinetuneConfig(steps=2, lr=1e-2, density=(0.3, 0.3))
    tuner = Finetuner(prepare(model, lora=lora), gates, TextWindows(text, 96), config)
    before = gates.base.fingerprint
    list(tuner.run())
    folder = save_finetuned(tuner, tmp_path, policy="top_k:0.3")
    assert folder == tmp_path / "model"
    assert {p.suffix for p in folder.iterdir()} == {".json", ".safetensors"}
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.rope_parameters["factor"] == 4
    assert loaded.config.max_position_embeddings == 1024
    tokens = torch.from_numpy(TextWindows(text, 96)(0))
    with torch.no_grad():
        dense = loaded(tokens).logits
        assert torch.equal(dense, tuner.model(tokens).logits)
        saved = load_gates(tmp_path / "gates")
        assert saved.base.fingerprint not in ("", before)
        assert saved.reach == 96
        attach(loaded, saved, min_tokens=0)
        assert not torch.equal(loaded(tokens).logits, dense)
    detach(loaded)


@pytest.mark.parametrize("what", ["a weight", "what it computes"])
def test_a_model_of_nan_is_not_saved(tiny, model, text, tmp_path, what):
    tuner = Finetuner(prepare(model), tiny.gates_of(model), TextWindows(text, 96), FinetuneConfig(steps=1))
    with torch.no_grad():
        weight = model.lm_head.weight
        weight.fill_(3e38) if what == "what it computes" else weight[0, 0].fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"is not saved: in torch.float32 .* is not finite"):
        save_finetuned(tuner, tmp_path, policy="top_k:0.1")
    assert list(tmp_path.iterdir()) == []


def test_block_rope_follows_the_models_scaling(tiny, text):
    for kind in ("yarn", "llama3", "linear", "dynamic"):
        plain = tiny.make()
        config = copy.deepcopy(plain.config)
        extend_context(config, kind, 4, 900)
        model = type(plain)(config)
        model.load_state_dict(plain.state_dict())
        assert config.max_position_embeddings == (256 if kind == "dynamic" else 1024)
        # Gates distilled before the extension.
        gates = tiny.gates_of(plain)
        tuner = Finetuner(prepare(model), gates, TextWindows(text, 300), FinetuneConfig(steps=1))
        tuner.accumulate(tuner.batches(0), 0.3)
        positions = torch.arange(0, 300, 8)[None]
        expected = model.model.rotary_emb(torch.zeros(1), positions)
        for _, gate in gates.items():
            cos, sin = gate._turns(positions[0], 1)
            assert torch.equal(cos, expected[0])
            assert torch.equal(sin, expected[1])
        assert not torch.equal(cos, plain.model.rotary_emb(torch.zeros(1), positions)[0])


def test_a_loss_that_is_not_finite_stops_with_step_and_batch_and_loses_nothing(tiny, model, text, tmp_path):
    config = FinetuneConfig(steps=5, lr=1e-3, save_every=1, warmup_gate_steps=2)
    gates = tiny.gates_of(model)
    tuner = Finetuner(prepare(model), gates, TextWindows(text, 96), config, out=tmp_path)
    run = tuner.run()
    next(run)
    saved = (tmp_path / "checkpoint.safetensors").read_bytes()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    good = state_of(model), state_of(gates)
    with pytest.raises(
        FloatingPointError, match=r"step 2, on batch 3 of the text, has loss nan.*is of step 1"
    ):
        next(run)
    assert all(torch.equal(good[0][k].nan_to_num(), v.nan_to_num()) for k, v in state_of(model).items())
    assert same(good[1], state_of(gates))
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == saved


def test_another_runs_checkpoint_is_refused(tiny, text, tmp_path):
    def start(config, **rope):
        model = tiny.make()
        if rope:
            extend_context(model.config, **rope)
        return Finetuner(prepare(model), tiny.gates_of(model), TextWindows(text, 96), config, out=tmp_path)

    list(start(FinetuneConfig(steps=1)).run())
    with pytest.raises(ValueError, match=r"another run, config\.lr differ"):
        start(FinetuneConfig(steps=1, lr=1e-4))
    with pytest.raises(ValueError, match=r"another run, rope\.rope_type, rope\.factor"):
        start(FinetuneConfig(steps=1), kind="yarn", factor=2, length=300)


def test_a_backend_without_a_backward_is_refused_with_those_that_have_one(tiny, model, text):
    gates = tiny.gates_of(model)

    def start(backend, **settings):
        return Finetuner(
            prepare(model), gates, TextWindows(text, 96), FinetuneConfig(steps=1, **settings), backend=backend
        )

    with pytest.raises(
        ValueError, match=r"'triton' cannot train through selected blocks here .*can: .*reference"
    ):
        start("triton")
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        start("fast")
    with pytest.raises(ValueError, match=r"soft gates put a bias into the logits.*'gather' on cpu cannot"):
        start("gather", soft_gates=True)
    # Nothing passes the attention where only gates learn.
    tuner = Finetuner(
        prepare(model, gates_only=True),
        gates,
        TextWindows(text, 96),
        FinetuneConfig(steps=1),
        backend="gather",
    )
    list(tuner.run())


def test_what_contradicts_itself_is_refused(tiny, model, text):
    with pytest.raises(
        ValueError, match=r"yarn with factor 2 reaches 2 x 256 = 512 tokens, fewer than the 900"
    ):
        extend_context(tiny.make().config, "yarn", 2, 900)
    with pytest.raises(ValueError, match="above 1, got 1"):
        extend_context(tiny.make().config, "yarn", 1, 200)
    with pytest.raises(ValueError, match="one of linear, dynamic, yarn, llama3"):
        extend_context(model.config, "ntk", 4, 900)
    extend_context(model.config, "yarn", 4, 900)
    with pytest.raises(ValueError, match="scaled already"):
        extend_context(model.config, "yarn", 4, 900)
    with pytest.raises(ValueError, match="exclude each other"):
        prepare(model, lora=2, gates_only=True)
    with pytest.raises(ValueError, match="nothing would learn"):
        Finetuner(
            prepare(model, gates_only=True),
            tiny.gates_of(model),
            TextWindows(text, 96),
            FinetuneConfig(gate_weight=0.0),
        )
    other, gates = tiny.make(), tiny.gates_of(model)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.add_(1)
    with pytest.raises(ValueError, match=r"gates were made for .*its attention weights differ"):
        Finetuner(prepare(other), gates, TextWindows(text, 96))
    for phase in ("decode", "both"):
        with pytest.raises(ValueError, match=f"these gates are for phase {phase}.*leave gate.phase out"):
            Finetuner(prepare(model), tiny.gates_of(model, phase=phase), TextWindows(text, 96))
    drops = tiny.make(attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"attention dropout \(0.1\).*set attention_dropout to 0"):
        Finetuner(prepare(drops), tiny.gates_of(drops), TextWindows(text, 96))
    attach(model, gates, "top_k:0.3")
    with pytest.raises(ValueError, match="gates are attached to this model"):
        Finetuner(prepare(model), gates, TextWindows(text, 96))
    detach(model)
    checkpoint_layers(model)
    with pytest.raises(ValueError, match="soft gates keep the maps of all layers"):
        Finetuner(
            prepare(model), tiny.gates_of(model), TextWindows(text, 96), FinetuneConfig(soft_gates=True)
        )


@peft_is_behind
def test_a_base_in_four_bits_gets_adapters_but_no_full_training(tiny, text, tmp_path):
    from transformers import BitsAndBytesConfig

    tiny.make().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cpu",
        dtype=torch.float32,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"the base model is quantised.*train adapters on it"):
        prepare(model)
    tuner = Finetuner(
        prepare(model, lora=2), tiny.gates_of(model), TextWindows(text, 96), FinetuneConfig(steps=1)
    )
    list(tuner.run())
    assert save_finetuned(tuner, tmp_path / "out", policy="top_k:0.3").name == "adapter"
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
