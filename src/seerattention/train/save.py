"""What a fine-tuning leaves: a model that plain transformers loads, and gates that know it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from seerattention.files import atomic_folder
from seerattention.hosts.transformers import BaseInfo, save_gates
from seerattention.hosts.transformers.intercept import unwrapped
from seerattention.train.checkpoint import infinite
from seerattention.train.finetuner import Finetuner

#: Folders of a fine-tuned model, or of adapters on a quantised one, and of its gates.
MODEL, ADAPTER, GATES = "model", "adapter", "gates"


def save_finetuned(
    tuner: Finetuner,
    out: Path,
    *,
    policy: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rebuild: Callable[[], nn.Module] | None = None,
) -> Path:
    """Save the trained model and its gates, each whole or not at all; every process must call it.

    The model is saved in the precision in which it came. LoRA adapters are merged into the weights for
    good, so that there is one model, whose fingerprint the gates carry; on a quantised base, which they
    cannot be merged into, they are saved alone and the gates keep the base's identity.

    Args:
        tuner: What was trained.
        out: Folder that gets ``model`` (or ``adapter``) and ``gates``.
        policy: The policy saved with the gates.
        tokenizer: Saved beside the model.
        rebuild: Makes the model again as it was before training, with its adapters, on one process: what a
            sharded model is put together in.

    Returns:
        The folder of the model or of the adapters.

    Raises:
        FileExistsError: If something other than gates is where the gates go.
        FloatingPointError: If a weight is not finite in the model's precision.
        OSError: If a folder cannot be written.
        ValueError: If the model is sharded and ``rebuild`` is missing.
    """
    wrapped = tuner.wrapped
    if tuner.sharded:
        if rebuild is None:
            raise ValueError("a sharded model is saved through rebuild, which makes it again in one piece")
        tensors = tuner.trained_tensors()
        if tuner.accelerator.is_main_process:
            wrapped = rebuild()
            own = dict(unwrapped(wrapped).named_parameters())
            with torch.no_grad():
                for name, value in tensors.items():
                    own[name].copy_(value)
    quantised = getattr(unwrapped(wrapped), "is_quantized", False)
    folder = out / (ADAPTER if hasattr(wrapped, "peft_config") and quantised else MODEL)
    if tuner.accelerator.is_main_process:
        _save(wrapped, tuner, folder, tokenizer)
        # As plain transformers reads it back: gates know what others will load.
        if folder.name == MODEL:
            tuner.gates.base = BaseInfo.of(AutoModelForCausalLM.from_pretrained(folder))
        save_gates(tuner.gates, out / GATES, policy=policy)
    tuner.accelerator.wait_for_everyone()
    return folder


def _save(wrapped: Any, tuner: Finetuner, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    merges = folder.name == MODEL and hasattr(wrapped, "peft_config")
    model: PreTrainedModel = wrapped.merge_and_unload() if merges else wrapped
    if folder.name == MODEL:
        # Not its buffers: rotary frequencies stay in fp32, as they are when a model is loaded.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(tuner.dtype)
        model.config.dtype = tuner.dtype
    model.eval()
    found: dict[str, Tensor] = dict(model.named_parameters())
    if folder.name == MODEL:
        with torch.no_grad():
            tokens = torch.zeros(1, 8, dtype=torch.long, device=model.device)
            found["what it computes"] = model(tokens).logits
    if bad := infinite(found):
        raise FloatingPointError(
            f"the model is not saved: in {tuner.dtype} {bad[0]} is not finite; start again with a lower "
            "learning rate"
        )
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
