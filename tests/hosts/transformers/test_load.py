"""A base model on a device, and what is refused before anything is loaded."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from seerattention.hosts.transformers import load_base, named_device
from seerattention.measure import bundled

TINY = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1,
)  # fmt: skip


def test_a_model_in_a_precision_and_with_another_configuration(tmp_path) -> None:
    LlamaForCausalLM(TINY).save_pretrained(tmp_path)
    model = load_base(str(tmp_path), dtype="bfloat16", device="cpu")
    assert (model.dtype, model.device.type, model.training) == (torch.bfloat16, "cpu", False)
    assert load_base(str(tmp_path), device="cpu").dtype == torch.float32
    config = AutoConfig.from_pretrained(tmp_path)
    config.rms_norm_eps = 0.5
    assert load_base(str(tmp_path), device="cpu", config=config).config.rms_norm_eps == 0.5


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype must be one of auto, float32, bfloat16, float16, got 'int8'"):
        load_base("nowhere", dtype="int8", device="cpu")
    with pytest.raises(ValueError, match="device 'abacus' is not a device"):
        load_base("nowhere", device="abacus")
    with pytest.raises(ValueError, match="got 'int8'"):
        bundled.named_model(bundled.BUNDLED, dtype="int8", device="cpu")
    if not torch.cuda.is_available():
        assert named_device() == torch.device("cpu")
        with pytest.raises(ValueError, match="device 'cuda' was asked for, but torch sees no GPU"):
            named_device("cuda")


def test_the_bundled_model_goes_by_two_names() -> None:
    for name in (bundled.BUNDLED, bundled.TEACHER_NAME):
        model, tokenizer = bundled.named_model(name, device="cpu")
        assert (model.dtype, len(tokenizer)) == (torch.float32, 8192)
    assert bundled.named_model(bundled.BUNDLED, dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16
    assert bundled.named_gates(bundled.BUNDLED).base.name == bundled.TEACHER_NAME
