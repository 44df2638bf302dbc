"""Write a teacher as a folder that transformers loads, with a model card made from its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

CARD = """---
license: mit
language: en
library_name: transformers
---

# A small long-context teacher

A {kind}-shaped language model of {parameters:.1f} M parameters ({layers} layers, {heads} query and {kv} KV
heads of 64, vocabulary 8192, context 32768), small enough to ship with a library and to run on a laptop,
yet with the attention of a long-context model: it finds numbers hidden anywhere in 32k tokens of a novel.
It exists to be taught sparse attention; as a writer it is only fluent.

## Results

Held-out books; eight numbers hidden per document and asked for at its end, {documents} documents per length,
an answer counts if all five digits are right.

| tokens | loss (nats per token) | needles found |
|---|---|---|
{table}

A sample (temperature 0.9, top-p 0.95):

> {sample}

## Data

Training: 402 public-domain English books (205 MB of text): windows of them, the same with hidden numbers and
questions, and the same with a passage that returns, in shares that differ by stage (`recipe.toml`).
Evaluation: 13 Standard Ebooks (CC0 1.0), never trained on.

## Recipe

`experiments/teacher/` of the seerattention repository: {tokens:.0f} M tokens in stages of 512, 2k, 8k and 32k
tokens on one GPU, seed {seed}. The comments of `recipe.toml` say how the shipped weights were made stage by
stage.

## Licence and limits

Weights: MIT. The books are old: so are their language and their views. The model knows nothing, follows no
instructions, repeats itself when sampled at low temperature, and must not be used for anything but
experiments with attention.
"""


def export(
    model: PreTrainedModel, tokenizer: Any, results: dict[str, Any], recipe: dict[str, Any], out: Path
) -> None:
    """Save weights in bfloat16, configuration, tokenizer, results and model card."""
    model = model.to(torch.bfloat16)
    model.generation_config.max_length = None
    model.config._name_or_path = ""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    table = "\n".join(
        f"| {r['tokens']} | {r['loss']:.3f} | {r['needle']:.1%} of {r['questions']} |"
        for r in results["lengths"]
    )
    (out / "README.md").write_text(
        CARD.format(
            kind=type(model).__name__.removesuffix("ForCausalLM"),
            parameters=sum(p.numel() for p in model.parameters()) / 1e6,
            layers=model.config.num_hidden_layers,
            heads=model.config.num_attention_heads,
            kv=model.config.num_key_value_heads,
            documents=recipe["evaluate"]["documents"],
            table=table,
            sample=" ".join(results["sample"].split()),
            tokens=sum(s["tokens"] for s in recipe["stage"]) / 1e6,
            seed=recipe["seed"],
        )
    )
