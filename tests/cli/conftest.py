"""A tiny model and text for it, as commands find them."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from seerattention import cli


@pytest.fixture(scope="session")
def save_tokenizer():
    """Writer of a tokenizer of 64 words into a folder."""

    def save(folder):
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder)

    return save


@pytest.fixture(scope="session")
def base(tmp_path_factory, save_tokenizer):
    """A tiny model of 256 tokens and its tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in np.random.default_rng(0).integers(2, 64, 2000)))
    return path


@pytest.fixture(scope="session")
def invoke():
    """What a person types, run: its result and its output in one line."""

    def run(*arguments):
        result = CliRunner().invoke(cli.app(), [str(a) for a in arguments])
        return result, " ".join(result.output.split())

    return run


@pytest.fixture(scope="session")
def distil(base, text, invoke):
    """Distillation of small gates."""

    def run(out, *more):
        small = [f"--set=gate.{name}" for name in ("block_size=16", "q_sub_block=8", "k_sub_block=8")]
        return invoke("distill", base, "--text", text, "--out", out, "--length", 128, *small, *more)

    return run
