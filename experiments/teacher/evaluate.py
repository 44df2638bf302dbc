"""Measure a teacher on held-out books: loss and needle retrieval at several lengths, and a sample of text."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from seerattention.measure.needle import NeedleTask


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel, tokenizer: Any, heldout: np.ndarray, recipe: dict[str, Any]
) -> dict[str, Any]:
    """Return ``{"lengths": [{"tokens", "loss", "needle", "questions"}...], "sample": text}``."""
    settings = recipe["evaluate"]
    task = NeedleTask(tokenizer, heldout, digits=recipe["data"]["digits"])
    rows = []
    for length in settings["lengths"]:
        losses = []
        for i in range(max(1, settings["text_tokens"] // length)):
            start = i * (len(heldout) - length) // max(1, settings["text_tokens"] // length)
            tokens = torch.from_numpy(heldout[start : start + length].astype(np.int64)).to(model.device)[None]
            hidden = model.model(tokens, use_cache=False).last_hidden_state[0, :-1]
            for part, target in zip(hidden.split(4096), tokens[0, 1:].split(4096), strict=True):
                losses.append(F.cross_entropy(model.lm_head(part).float(), target, reduction="none"))
        correct = asked = 0
        for seed in range(settings["documents"]):
            document = task.make(length, seed)
            tokens = torch.from_numpy(document.tokens).to(model.device)[None]
            hidden = model.model(tokens, use_cache=False).last_hidden_state[0]
            where = torch.from_numpy(document.query_positions).to(model.device)
            correct += document.correct(model.lm_head(hidden[where]).argmax(-1).cpu().numpy())
            asked += len(document.answers)
        rows.append(
            {
                "tokens": length,
                "loss": round(float(torch.cat(losses).mean()), 4),
                "needle": round(correct / asked, 4),
                "questions": asked,
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
