"""What vLLM's host serves and what it refuses, before a model is loaded."""

from __future__ import annotations

from typing import Any

from seerattention.hosts.transformers.rotary import by_length
from seerattention.hosts.vllm.settings import Settings

#: Versions of vLLM whose interfaces the plugin knows.
VERSIONS = ("0.32.0",)

VERSION = "seerattention serves in vLLM {versions}, and this is {found}; install one of these"
PLATFORM = "seerattention serves in vLLM's CPU build so far, and this platform is {name}"
PRECISION = "kv_cache_dtype is {dtype}, and gates read keys in the model's own precision; leave it out"
BIDIRECTIONAL = "the model's tokens see what comes after them, and gates were taught on what comes before"
SCHEDULER = (
    "aligned takes a scheduler of this package, and scheduler_cls asks for another; leave one of them out"
)
NO_POLICY = (
    "these gates were saved without a policy for prompts; name one in seerattention's settings, e.g. "
    "'policy': 'top_k:0.1'"
)
SPLIT = (
    "pipeline parallelism begins a process with layer {layer}, which reads what a layer of another process "
    "chose; split the layers where gates are, or distil gates with layers_per_gate 1"
)
OFF = (
    "with policy 'dense' nothing is left to choose; leave seerattention's settings out, or where the model's "
    "config.json has some, set 'seerattention' to false"
)
MLA = "multi-head latent attention caches no keys per head for gates to read"
CONTEXT = "decode context parallelism spreads a prompt's keys over processes; leave it out"
MROPE = "positions of several dimensions (mrope) cannot be rotated back by one number per token"
LENGTHS = (
    "RoPE is of type {kind}: its angles follow the length of the text, and keys of a cache cannot be "
    "rotated back"
)
RUNNER = (
    "seerattention asks vLLM's first model runner how long prompts are, and this engine takes the second; "
    "set VLLM_USE_V2_MODEL_RUNNER=0"
)
CONNECTOR = (
    "pages that a KV connector brings have no summaries beside them; set summaries to 'made' in "
    "seerattention's settings, to have them made again from the keys"
)
GUESSES = (
    "tokens that a draft model guessed are taken back without telling who keeps summaries; set summaries to "
    "'made' in seerattention's settings"
)
GROUPS = (
    "these gates score once per KV head, of which there are {heads}, and {size} processes split the queries "
    "of one; use {heads} or fewer"
)
PAGES = (
    "pages of {page} tokens do not hold whole blocks of {block}; set vLLM's block_size to a multiple, or "
    "summaries to 'made' in seerattention's settings"
)


def refusals(config: Any, settings: Settings, version: str, platform: str) -> list[str]:
    """Return why an engine of this configuration cannot be served, a sentence each.

    Args:
        config: vLLM's configuration of the engine.
        settings: The engine's settings.
        version: Of vLLM.
        platform: Name of vLLM's device type, e.g. ``cpu``.
    """
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    text = model.hf_text_config
    rope = getattr(text, "rope_parameters", None) or {}
    found, kept = [], settings.summaries == "kept"
    if version not in VERSIONS:
        found.append(VERSION.format(versions=" or ".join(VERSIONS), found=version))
    if platform != "cpu":
        found.append(PLATFORM.format(name=platform))
    if cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
        found.append(PRECISION.format(dtype=cache.cache_dtype))
    if model.attn_type != "decoder" or getattr(text, "is_causal", True) is False:
        found.append(BIDIRECTIONAL)
    if model.use_mla:
        found.append(MLA)
    if parallel.decode_context_parallel_size > 1:
        found.append(CONTEXT)
    if model.uses_mrope or "mrope_section" in rope:
        found.append(MROPE)
    elif (kind := by_length(text)) is not None:
        found.append(LENGTHS.format(kind=kind))
    if config.use_v2_model_runner:
        found.append(RUNNER)
    if settings.aligned and config.scheduler_config.scheduler_cls is not None:
        found.append(SCHEDULER)
    if kept and config.kv_transfer_config is not None:
        found.append(CONNECTOR)
    if kept and config.speculative_config is not None:
        found.append(GUESSES)
    return found
