"""Weights that are not a model's own: adapters of requests, and weights of 8 bits."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest

from seerattention.measure import bundled
from tests.vllm.engines import NEW_TOKENS, Alone, answers, assert_as_alone, engine, settings, texts, watched

RANK = 8
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def adapt(model, folder):
    """Write an adapter of a model's attention layers, and add it to their weights."""
    weights = {}
    for name, module in model.named_modules():
        if name.endswith(PROJECTIONS):
            a = 0.05 * torch.randn(RANK, module.in_features)
            b = 0.05 * torch.randn(module.out_features, RANK)
            weights |= {
                f"base_model.model.{name}.lora_A.weight": a,
                f"base_model.model.{name}.lora_B.weight": b,
            }
            module.weight.data += b @ a
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(PROJECTIONS)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("summaries", ["kept", "made"])
def test_requests_with_an_adapter(summaries, tmp_path):
    torch.manual_seed(0)
    prompts, adapted = texts(1500, 777), Alone()
    adapt(adapted.model, tmp_path)
    expected, rows = adapted.answers(prompts)
    assert Alone().answers(prompts)[0] != expected
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    with engine(settings(summaries=summaries), enable_lora=True, max_lora_rank=RANK) as llm:
        seen = watched(llm)
        given = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        asked = LoRARequest("adapter", 1, str(tmp_path))
        outs = llm.generate(given, params, lora_request=asked, use_tqdm=False)
        assert [list(out.outputs[0].token_ids) for out in outs] == expected
        assert seen.taken() == rows
        # Pages of these are none of requests without it.
        assert_as_alone(llm, prompts)


def eight_bits(folder):
    """Write the bundled model with weights of 8 bits, as compressed-tensors has them, and return them."""
    for file in bundled.TEACHER.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    weights, exact = load_file(bundled.TEACHER / "model.safetensors"), {}
    for name in [name for name in weights if ".layers." in name and name.endswith("proj.weight")]:
        scale = weights[name].float().abs().amax(1, keepdim=True) / 127
        weights[name] = (weights[name].float() / scale).round().to(torch.int8)
        weights[f"{name}_scale"], exact[name] = scale, weights[name] * scale
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    whole = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**whole, "strategy": "channel", "dynamic": False},
        "input_activations": {**whole, "strategy": "token", "dynamic": True},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return exact


def test_weights_of_eight_bits(tmp_path):
    """Beside the same weights in floating point; vLLM rounds what they multiply to 8 bits too."""
    prompts, alone = texts(1500, 777), Alone()
    alone.model.load_state_dict(eight_bits(tmp_path), strict=False)
    expected, rows = alone.answers(prompts)
    with pytest.raises(ValueError, match="a fine-tuned variant may use them with check_base=False"):
        engine(settings(), model=tmp_path).__enter__()
    with engine(settings(check_base=False), model=tmp_path) as llm:
        seen = watched(llm)
        said = answers(llm, prompts)
    assert [one[0] for one in said] == [one[0] for one in expected]
    chosen = seen.taken()
    assert chosen.keys() == rows.keys()
    assert sum(chosen[key] == row for key, row in rows.items()) > 0.85 * len(rows)
