"""Families in vLLM: what is rotated back from its pages is what gates read in the attached model."""

import pytest
import torch

from seerattention import attach, load_gates
from seerattention.hosts import transformers as host
from tests.hosts.transformers import conftest as tiny
from tests.vllm.engines import Chosen, answers, engine, watched

#: vLLM's CPU kernels know heads of 32 numbers and more.
WIDE = {"head_dim": 32, "hidden_size": 128, "vocab_size": 128}
# In vLLM every second layer of gpt_oss has a window, from the first on.
TURNS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
CHANGES = {"gpt_oss": TURNS}
#: vLLM takes no Qwen2 with windows in some layers.
KINDS = [kind for kind in tiny.ATTACHABLE if kind != "qwen2-mixed"]


def read_alike(model, gates, tmp_path):
    """Prompts read in vLLM, in pieces, what they read in the attached model, and get its answers."""
    model.save_pretrained(tmp_path / "model")
    host.save_gates(gates, tmp_path / "gates")
    prompts = [tiny.tokens(1, length, seed=length)[0].tolist() for length in (200, 77, 16)]
    seen = Chosen()
    attach(model, load_gates(tmp_path / "gates"), "top_k:0.4", min_tokens=0, observe=seen)
    expected = [
        model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    rows = seen.taken()
    given = {"gates": str(tmp_path / "gates"), "policy": "top_k:0.4", "min_tokens": 0, "aligned": True}
    # What an earlier piece left is read.
    options = {"max_model_len": 256, "max_num_batched_tokens": 96, "block_size": 32}
    options |= {"model": tmp_path / "model", "skip_tokenizer_init": True}
    for summaries in ("kept", "made"):
        with engine({**given, "summaries": summaries}, **options) as llm:
            chosen = watched(llm)
            assert answers(llm, prompts, 4) == expected
        assert chosen == rows


@pytest.mark.parametrize("kind", KINDS)
def test_rows_read_what_they_read_in_the_attached_model(kind, tmp_path):
    model = tiny.make(kind, **WIDE, **CHANGES.get(kind, {}))
    read_alike(model, tiny.gates_for(model), tmp_path)


def test_gates_that_serve_several_layers(tmp_path):
    model = tiny.make("qwen3", **WIDE, num_hidden_layers=5)
    read_alike(model, tiny.gates_for(model, layers_per_gate=2), tmp_path)
