"""What vLLM's host serves and what it refuses, before a model is loaded."""

from __future__ import annotations

from typing import Any

from seerattention.hosts.transformers.rotary import by_length
from seerattention.hosts.vllm.settings import KEEPS, Settings

#: Versions of vLLM whose interfaces the plugin knows, by vLLM's name of the kind of device.
VERSIONS = {"cpu": ("0.32.0",), "cuda": ("0.26.0",)}

#: What takes the place of which of vLLM's backends.
BACKENDS = {
    "cpu": {"CPU_ATTN": "seerattention.hosts.vllm.cpu.SparseCPUBackend"},
    "cuda": {
        "FLASH_ATTN": "seerattention.hosts.vllm.cuda.SparseFlashBackend",
        "TRITON_ATTN": "seerattention.hosts.vllm.cuda.SparseTritonBackend",
    },
}

VERSION = "on {name} seerattention serves in vLLM {versions}, and this is {found}; install one of these"
PLATFORM = "seerattention serves in vLLM on {names}, and this platform is {name}"
ATTENTION = "attention_config asks for {asked}, and seerattention takes the place of {known}; leave it out"
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
GRAPHS = (
    "cudagraph_mode {mode} replays batches with prompts as they were captured, and what prompts read is "
    "chosen in each; leave it out, or set FULL_AND_PIECEWISE"
)
UBATCHES = "microbatches (enable_dbo, ubatch_size) cut a batch without telling whose prompts are in a part"
RUNNER = (
    "seerattention asks vLLM's first model runner how long prompts are, and this engine takes the second; "
    "set VLLM_USE_V2_MODEL_RUNNER=0"
)
UNPLANNED = (
    "vLLM {version} plans no pages for summaries; leave summaries out of seerattention's settings, or set "
    "them to 'made'"
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
    if platform not in VERSIONS:
        found.append(PLATFORM.format(names=" and ".join(VERSIONS), name=platform))
    elif version not in VERSIONS[platform]:
        versions = " or ".join(VERSIONS[platform])
        found.append(VERSION.format(name=platform, versions=versions, found=version))
    asked, known = config.attention_config.backend, BACKENDS.get(platform, {})
    if platform != "cpu" and asked is not None and asked.name not in known:
        found.append(ATTENTION.format(asked=asked.name, known=" and ".join(known)))
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
    if parallel.use_ubatching:
        found.append(UBATCHES)
    graphs = config.compilation_config.cudagraph_mode
    if graphs.mixed_mode().name == "FULL":
        found.append(GRAPHS.format(mode=graphs.name))
    if config.use_v2_model_runner:
        found.append(RUNNER)
    if settings.aligned and config.scheduler_config.scheduler_cls is not None:
        found.append(SCHEDULER)
    if kept and platform not in KEEPS:
        found.append(UNPLANNED.format(version=version))
    if kept and config.kv_transfer_config is not None:
        found.append(CONNECTOR)
    if kept and config.speculative_config is not None:
        found.append(GUESSES)
    return found
