"""A base model on a device, and what is refused before anything is loaded."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from seerattention.hosts.transformers import load_base, named_device
from seerattention.hosts.transformers.load import load_tokenizer, outside
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
    assert named_device("cpu:0") == torch.device("cpu:0")
    if not torch.cuda.is_available():
        assert named_device() == torch.device("cpu")
    # What torch knows the name of and does not have, and what holds no numbers.
    for name in ("cuda:99", "xpu", "hpu", "vulkan", "meta", *(["mps"] if sys.platform == "linux" else [])):
        with pytest.raises(ValueError, match=f"device '{name}' was asked for, but torch cannot use it here"):
            named_device(name)


def of(change):
    """A change of what a JSON file holds."""

    def rewrite(path):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return rewrite


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-100])),
        ("model.safetensors", lambda path: path.write_bytes(b"\xff" * 100)),
        ("config.json", of(lambda config: config.update(hidden_size="wide"))),
        ("config.json", of(lambda config: config.update(hidden_act="none that there is"))),
        ("config.json", of(lambda config: config.update(num_attention_heads=0))),
        ("config.json", of(lambda config: config.update(vocab_size=2**70))),
        ("tokenizer.json", lambda path: path.write_text("{")),
        ("tokenizer.json", lambda path: path.write_text("[" * 10**5)),
        ("tokenizer.json", of(lambda config: config["model"].update(vocab={"a": "b"}))),
        ("tokenizer_config.json", of(lambda config: config.update(eos_token=3))),
    ],
)
def test_a_damaged_model_is_refused_by_its_name(tmp_path, file, damage) -> None:
    LlamaForCausalLM(TINY).save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(ValueError, match=f"the model {tmp_path} cannot be loaded, perhaps") as refused:
        bundled.named_model(str(tmp_path), device="cpu")
    assert len(str(refused.value)) < 800
    assert "\n" not in str(refused.value)


def test_tokenizers_raises_no_kind_of_error_but_the_class_of_all(tmp_path) -> None:
    """Why `outside` catches so much."""
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    of(lambda content: content["model"].update(vocab={"a": "b"}))(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="cannot be loaded, perhaps its files are damaged: ") as refused:
        load_tokenizer(str(tmp_path))
    assert type(refused.value.__cause__) is Exception


@pytest.mark.parametrize("error", [OSError, ImportError, NotImplementedError, MemoryError, KeyboardInterrupt])
def test_errors_that_name_themselves_pass_as_they_are(error) -> None:
    with pytest.raises(error, match=r"^its own words$"), outside("the thing cannot be read"):
        raise error("its own words")


@pytest.mark.parametrize(
    ("error", "said"), [(KeyError("name"), "'name'"), (RecursionError(), "RecursionError")]
)
def test_other_errors_become_a_sentence(error, said) -> None:
    sentence = f"^the thing cannot be read: {said}$"
    with pytest.raises(ValueError, match=sentence) as refused, outside("the thing cannot be read"):
        raise error
    assert refused.value.__cause__ is error


@pytest.mark.parametrize("name", ["/no/model", "./model", "~/model", "models/my/model", "../model"])
def test_a_folder_that_is_not_there_is_no_hub_id(name) -> None:
    with pytest.raises(FileNotFoundError, match=f"there is no folder {name}; give a folder"):
        load_base(name, device="cpu")


def test_a_model_that_may_not_be_read_is_not_called_missing(public, unreadable) -> None:
    LlamaForCausalLM(TINY).save_pretrained(public)
    load_base(str(public), device="cpu")
    with (
        unreadable(public / "model.safetensors"),
        pytest.raises(PermissionError, match=r"denied.*model\.safetensors"),
    ):
        load_base(str(public), device="cpu")


def test_the_bundled_model_goes_by_two_names() -> None:
    for name in (bundled.BUNDLED, bundled.TEACHER_NAME):
        model, tokenizer = bundled.named_model(name, device="cpu")
        assert (model.dtype, len(tokenizer)) == (torch.float32, 8192)
    assert bundled.named_model(bundled.BUNDLED, dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16
    assert bundled.named_gates(bundled.BUNDLED).base.name == bundled.TEACHER_NAME
