"""The report at the end of a training, on needles: asked in words that the model at hand understands."""

import json
import re

import numpy as np
import pytest
import torch
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from seerattention.cli import _training
from seerattention.measure import retrieval

#: What only documents in one of the wordings hold.
TEACHERS, PLAIN, CHAT = "The number of the ", "?\x20The special", "<user>"


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A tiny model of bytes with a chat template, as a folder, and text for it."""
    folder = tmp_path_factory.mktemp("talker")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({"</s>": 0, **{c: i + 1 for i, c in enumerate(letters)}}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    words = np.random.default_rng(0).choice(["some", "words", "of", "a", "text"], 2500)
    (folder / "text.txt").write_text(" ".join(words))
    return folder, tokenizer


@pytest.fixture
def reported(talker, invoke, monkeypatch, tmp_path):
    """What the report says, keeps and asks of a model that answers the documents that hold some words."""
    folder, tokenizer = talker
    monkeypatch.setattr(_training, "NEEDLES", 2)

    def run(understands, dense_alone=False):
        asked, passes = [], []

        def predictions(model, document):
            attached = hasattr(model.model.layers[0].self_attn, "attn_gate")
            text = tokenizer.decode(document.tokens)
            asked.append(next(words for words in (CHAT, PLAIN, TEACHERS) if words in text))
            right = understands in text and not (attached and dense_alone)
            return document.tokens[document.query_positions + 1] + (not right)

        monkeypatch.setattr(retrieval, "predictions", predictions)
        monkeypatch.setattr(Progress, "advance", lambda self, task, count=1: passes.append(count))
        result, said = invoke(
            "distill", folder, "--text", folder / "text.txt", "--out", tmp_path / "out", "--length", 3072,
            "--steps", 1, "--device", "cpu",
        )  # fmt: skip
        assert result.exit_code == 0, said
        plan = re.search(r"needle documents \(dense in 3 wordings\), dense, .*?: (\d+) passes", said)
        assert plan is not None
        # One window: its recall, and three rows' perplexity.
        assert int(plan[1]) == sum(passes) == 1 + 3 + 2 * (3 + 2)
        return asked, json.loads((tmp_path / "out" / "gates" / "results.json").read_text()), said

    return run


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (TEACHERS, "the bundled teacher's words"),
        (PLAIN, "RULER's words"),
        (CHAT, "RULER's words, in the chat template"),
    ],
)
def test_all_rows_are_asked_in_the_words_that_dense_attention_answers_best(reported, words, name):
    asked, kept, said = reported(words, dense_alone=True)
    assert asked == 2 * [TEACHERS] + 2 * [PLAIN] + 2 * [CHAT] + 4 * [words]
    assert kept["wording"] == name
    assert f"needles: {name}" in said
    assert "skipped" not in kept
    assert kept["dense"]["needles"] == 1
    assert [kept[row]["needles"] for row in ("top_k:0.2", "top_k:0.1")] == [0, 0]
    assert said.count("0.00 (-1.00)") == 2
    assert "perplexity needles" in said


def test_needles_that_dense_attention_does_not_find_are_left_out_with_the_reason(reported):
    asked, kept, said = reported("no such words")
    assert asked == 2 * [TEACHERS] + 2 * [PLAIN] + 2 * [CHAT]
    assert "wording" not in kept
    for row in ("dense", "top_k:0.2", "top_k:0.1"):
        assert kept[row]["perplexity"] > 1
        assert "needles" not in kept[row]
    why = (
        "needles: this model does not answer such questions at 3,072 tokens even with dense attention (at "
        "best 0% of them, in the bundled teacher's words), so that they say nothing about the gates"
    )
    assert kept["skipped"] == why
    assert f"not measured: {why}" in said
    assert "perplexity needles" not in said
