"""What is trained and how far the model reads, decided before any work: full weights, LoRA, RoPE scaling."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from seerattention.hosts.transformers.base import BaseInfo
from seerattention.ops.block_sparse_attention import BACKENDS, ORDER
from seerattention.ops.dispatch import check_backend, explain
from seerattention.ops.options import Options
from seerattention.rows import Rows
from seerattention.selection import BlockSelection

#: What RoPE scaling needs beyond its factor, unless the caller says otherwise. Source: Llama 3.1's settings.
ROPE_DEFAULTS: dict[str, dict[str, float]] = {
    "linear": {},
    "dynamic": {},
    "yarn": {},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


def prepare(model: PreTrainedModel, *, lora: int = 0, gates_only: bool = False) -> nn.Module:
    """Say by ``requires_grad`` which of a model's weights are trained.

    Args:
        model: A model as it was loaded.
        lora: Rank of LoRA adapters on all linear layers but the head; 0 trains the weights themselves.
        gates_only: Train nothing of the model.

    Returns:
        The model, with LoRA what PEFT made of it.

    Raises:
        ModuleNotFoundError: If LoRA is asked for and peft is not installed.
        ValueError: If the settings contradict each other, or all weights of a quantised model were asked
            for.
    """
    if lora and gates_only:
        raise ValueError("LoRA adapters and gates only exclude each other; give one of them")
    if lora < 0:
        raise ValueError(f"the rank of LoRA must be at least 1, got {lora}; 0 trains all weights")
    model.requires_grad_(False)
    if gates_only:
        return model
    if lora:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ModuleNotFoundError(
                "LoRA needs the package peft: pip install 'seerattention[train]'"
            ) from error
        config = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model, config)
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "the base model is quantised, and weights of so few bits cannot be trained; train adapters on it "
            "(lora), the gates alone (gates only), or load it in full precision"
        )
    return model.requires_grad_(True)


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Keep only the layers' inputs for the backward pass and run every layer again there."""
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(kwargs)
    else:
        # What older versions of transformers call it.
        model.gradient_checkpointing_enable(kwargs)


def extend_context(
    config: PreTrainedConfig, kind: str, factor: float, length: int, **settings: Any
) -> PreTrainedConfig:
    """Set transformers' RoPE scaling, so that a model reads ``factor`` times as far.

    Args:
        config: The configuration of a model without RoPE scaling, changed in place.
        kind: ``yarn``, ``linear``, ``dynamic`` or ``llama3``.
        factor: How many times its positions.
        length: Tokens that it will be trained on.
        settings: Further entries of ``rope_parameters``.

    Returns:
        The configuration.

    Raises:
        NotImplementedError: If kinds of layers have RoPE settings of their own.
        ValueError: If the kind is not known, RoPE is scaled already, or the length is out of reach.
    """
    if kind not in ROPE_DEFAULTS:
        raise ValueError(f"RoPE scaling must be one of {', '.join(ROPE_DEFAULTS)}, got {kind!r}")
    text = config.get_text_config()
    present = dict(getattr(text, "rope_parameters", None) or {})
    if "full_attention" in present:
        raise NotImplementedError(
            f"{text.model_type} has RoPE settings per kind of layer; set rope_parameters in its config.json"
        )
    if (before := present.get("rope_type", "default")) != "default":
        raise ValueError(
            f"the model's RoPE is scaled already ({before}, factor {present.get('factor')}); leave the "
            "scaling out, or start from the model before it"
        )
    original = text.max_position_embeddings
    if not 1 < factor < math.inf:
        raise ValueError(f"a RoPE factor must be above 1, got {factor}")
    if factor * original < length:
        raise ValueError(
            f"{kind} with factor {factor:g} reaches {factor:g} x {original:,} = {int(factor * original):,} "
            f"tokens, fewer than the {length:,} to train on; give a factor of {length / original:g} or more, "
            "or a shorter length"
        )
    scaled = {**present, "rope_type": kind, "factor": float(factor), **ROPE_DEFAULTS[kind], **settings}
    if kind in ("yarn", "llama3"):
        scaled.setdefault("original_max_position_embeddings", original)
    text.rope_parameters = scaled
    if kind != "dynamic":
        # Dynamic scaling starts where the original positions end, which it reads here.
        text.max_position_embeddings = int(factor * original)
    return config


def training_backend(
    model: PreTrainedModel, block_size: int, backend: str, *, trained: bool, soft: bool
) -> str:
    """Return the backend that can train this model with blocks of this size: the one that was asked for.

    For ``auto`` on a CPU where none of the fast ones has a backward, it is ``reference``. ``trained`` says
    whether gradients must pass the attention, ``soft`` whether gates are soft.

    Raises:
        ValueError: If it is unknown, or cannot train, with its reasons.
    """
    check_backend(BACKENDS, backend)
    on_cpu = model.device.type == "cpu"
    if soft:
        if backend == "reference" or (backend == "auto" and on_cpu):
            return "reference"
        raise ValueError(
            f"soft gates put a bias into the logits of each block, which backend {backend!r} on "
            f"{model.device.type} cannot; use the backend reference, whose memory grows with the square of "
            "the length, or hard gates"
        )
    if not trained:
        return backend
    reasons = _why_not(model, block_size)
    asked = ORDER if backend == "auto" else (backend,)
    if not all(reasons[name] for name in asked):
        return backend
    if backend == "auto" and on_cpu:
        return "reference"
    why = "; ".join(f"{name}: {'; '.join(reasons[name])}" for name in asked)
    able = ", ".join(name for name, reason in reasons.items() if not reason)
    raise ValueError(
        f"backend {backend!r} cannot train through selected blocks here ({why}). Backends that can: {able}; "
        "reference is for short sequences. Or train the gates alone"
    )


def _why_not(model: PreTrainedModel, block_size: int) -> dict[str, list[str]]:
    """Return every backend's reasons why it cannot train on tensors like this model's."""
    shape, length = BaseInfo.of(model), 2 * block_size
    dtype = torch.float32 if model.dtype == torch.float32 else torch.bfloat16
    like = {"dtype": dtype, "device": model.device, "requires_grad": True}
    q, k = (torch.zeros(1, h, length, shape.head_dim, **like) for h in (shape.num_heads, shape.num_kv_heads))
    selection = BlockSelection.full(Rows.last(length, length), (block_size, block_size), model.device)
    with torch.enable_grad():
        return explain(BACKENDS, q=q, k=k, v=k, selection=selection, options=Options.of(q, k))
