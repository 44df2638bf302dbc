"""Measure a teacher on held-out books: loss and needle retrieval at several lengths, and a sample of text."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from seerattention.measure.compare import measured
from seerattention.measure.needle import NeedleTask


def evaluate(
    model: PreTrainedModel, tokenizer: Any, heldout: np.ndarray, recipe: dict[str, Any]
) -> dict[str, Any]:
    """Return ``{"lengths": [{"tokens", "loss", "needle", "questions"}...], "sample": text}``."""
    settings = recipe["evaluate"]
    task = NeedleTask(tokenizer, heldout, digits=recipe["data"]["digits"])
    rows = []
    for length in settings["lengths"]:
        count = max(1, settings["text_tokens"] // length)
        starts = [i * (len(heldout) - length) // count for i in range(count)]
        documents = [task.make(length, seed) for seed in range(settings["documents"])]
        found = measured(
            model, None, windows=[heldout[start : start + length] for start in starts], documents=documents
        ).values()
        rows.append(
            {
                "tokens": length,
                "loss": round(math.log(found["perplexity"]), 4),
                "needle": round(found["needles"], 4),
                "questions": sum(len(document.answers) for document in documents),
            }
        )
        print(rows[-1], flush=True)
    prompt = tokenizer("The old house stood at the end of the lane, and", return_tensors="pt")["input_ids"]
    torch.manual_seed(0)
    written = model.generate(
        prompt.to(model.device), max_new_tokens=120, do_sample=True, temperature=0.9, top_p=0.95
    )
    sample = tokenizer.decode(written[0], skip_special_tokens=True)
    print(sample)
    return {"lengths": rows, "sample": sample}
