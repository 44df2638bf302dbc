"""What attached models can do and what they refuse: the README's table, each line of it a test."""

from __future__ import annotations

from dataclasses import dataclass

from seerattention.engine.summaries import POSITIONS

MAPS = (
    "output_attentions needs the whole attention map, which sparse attention never computes; detach(model) "
    "and load it with attn_implementation='eager' for that"
)
DROPOUT = "set attention_dropout=0 or call model.eval()"
PACKED = "sequences packed into one row are not supported, give them as a padded batch with an attention_mask"
MASKS = "masks of other kinds need dense attention: detach(model) first"
CAUSAL = (
    "attached models let tokens see what comes before them and nothing else; detach(model) or do it inside "
    "dense(model)"
)
UNKNOWN = "attached models do not know what that means; leave it out, or do it inside dense(model)"
SLIDING = (
    "padding between a row's tokens took the place of some of them in transformers' sliding-window cache; "
    "pad on the left, before a conversation begins, or give its rows one by one"
)
FULLGRAPH = "choosing blocks depends on the data, so attached attention stays outside of compiled graphs"
PREFIXES = "prefix tuning caches keys that were never rotated, so gates cannot read them; use LoRA"
SPLIT_HEADS = "each process needs whole heads, as many as the others; start a number that divides both"
SPLIT_PLAN = "processes must have all heads, or their own of q, k and v alike; leave the plan to the model"
SPLIT_LEARNING = (
    "gates learn from all heads, and tensor parallelism spread this model's over processes; load the model "
    "without it, or shard it by FSDP2"
)
SPREAD_WINDOWS = "a window's keys lie on other processes; use tensor parallelism"
SPREAD_HEADS = "transformers spreads a model over all processes there are; load it whole on each"
SPREAD_ROPE = (
    "no process sees how long the text is; use tensor parallelism, or another RoPE scaling, such as yarn"
)
SPREAD_TURN = (
    "a ContextParallelCache takes one prompt and what follows it, a few tokens at a time; give a longer "
    "conversation to a new one"
)
SPREAD_GATES = "layers that share a choice cannot be spread yet; distil gates with layers_per_gate 1"
SPREAD_MODE = "a ContextParallelCache is read by attached models alone, not inside dense(model) or intercept"
SPREAD_CHANGED = (
    "a ContextParallelCache cannot be copied, cropped or reordered, as beams and assistants need; decode "
    "without them"
)
SPREAD_GRADIENT = (
    "no gradient passes between processes that share a prompt; call the model in torch.no_grad()"
)
LONGROPE = "its angles depend on how long the text was when a key was rotated"
STEPS = (
    "continuous batching decodes densely, since it keeps no summaries from one step to the next; "
    'set_policy(model, decode="dense") first'
)
PAGES = (
    "continuous batching takes earlier keys from its pages, and they cannot be rotated back; serve this "
    "model inside dense(model)"
)
GRAPHS = (
    "in continuous batching an attached model's requests are told apart on the host, which a graph would not "
    "do again; leave these options out, or do it inside dense(model)"
)
WINDOWS = (
    "in continuous batching transformers 5.15 reads other keys than those in a sliding window; take 5.16 or "
    "newer"
)
KEPT = (
    "a manager of continuous batching was kept that serves otherwise, with other gates or without; call "
    "model.destroy_cached_continuous_batching_manager() first"
)
CAPTURE = (
    "a graph can hold sparse steps of decoding, and sliding windows once they are full; for other calls the "
    "host counts tokens, which a replay would not do; run them outside of the graph"
)
SERVED = "continuous batching can be served with versions 5.15 to 5.24, which have it"
CACHE = "versions 5.15 to 5.24, which are supported, call it `cache` or `past_key_values`"


@dataclass(frozen=True)
class Feature:
    """One line of the support table: what someone may want to do, and what it belongs to.

    ``reason`` is why not, a part of what a user is told, or None where it works; ``note`` is how it works.
    """

    kind: str
    name: str
    reason: str | None = None
    note: str = ""


def features() -> tuple[Feature, ...]:
    """Return what attached models can do and what they refuse."""
    return (
        Feature("cache", "dynamic"),
        Feature("cache", "static"),
        Feature("cache", "quantised", note="summaries are made again from what the cache gives back"),
        Feature("cache", "copied, cropped, reordered, rows selected"),
        Feature("cache", "filled before attaching, or by other gates"),
        Feature("cache", "the same with RoPE of type dynamic or longrope", LONGROPE),
        Feature("cache", "keys taken out, as by compression: sparse from then on", POSITIONS),
        Feature("prompt", "left or right padding"),
        Feature("prompt", "in pieces", note="`prefill`, or `prefill_chunk_size=` of `generate`"),
        Feature("prompt", "several turns on one cache"),
        Feature("prompt", "the same, with sliding windows and padding between a row's tokens", SLIDING),
        Feature("prompt", "packed sequences", PACKED),
        Feature("prompt", "4-D masks", MASKS),
        Feature("prompt", "bidirectional attention, is_causal=False", CAUSAL),
        Feature("generate", "greedy, sampling, beams"),
        Feature(
            "generate",
            "assisted: draft model, prompt lookup",
            note="guesses are verified as they are decoded, densely or each by its own choice",
        ),
        Feature("generate", "pipeline"),
        Feature(
            "generate",
            "continuous batching",
            note="`generate_batch`, `init_continuous_batching`; sparse prefill, dense decoding",
        ),
        Feature("generate", "continuous batching in CUDA graphs, compiled or asynchronous", GRAPHS),
        Feature("generate", "continuous batching with a policy for decoding", STEPS),
        Feature("generate", "continuous batching with RoPE of type dynamic or longrope", PAGES),
        Feature("generate", "output_attentions", MAPS),
        Feature("decoding", "static caches in CUDA graphs", note="a graph serves every length"),
        Feature("decoding", "left padding", note="in one call"),
        Feature("decoding", "padding between a row's tokens", note="that batch is dense"),
        Feature(
            "decoding",
            "beams, caches that were changed",
            note="then keys are compared once, as dear as a dense step",
        ),
        Feature("decoding", "quantised and offloaded caches", note="compared at every step"),
        Feature("decoding", "gates of its own", note="`decode_gates`; baselines too"),
        Feature("decoding", "with a gradient", note="dense"),
        Feature("base", "LoRA, before or after attaching"),
        Feature("base", "prefix tuning", PREFIXES),
        Feature("base", "4-bit (bitsandbytes)", note="told by its name, since its weights are others"),
        Feature("base", "8-bit (bitsandbytes)", note="told by its name, since its weights are others"),
        Feature("base", "device_map with layers on the disk"),
        Feature("base", "offloaded by Accelerate after attaching", note="gates and all"),
        Feature(
            "base",
            "save_pretrained",
            note="gates in use are written too, but transformers reads none; `save_gates` keeps them",
        ),
        Feature("base", "tensor parallelism", note="every process chooses for its own heads"),
        Feature("base", "tensor parallelism over processes that do not divide the heads", SPLIT_HEADS),
        Feature("base", "torch.compile", note="attention itself stays outside of the graphs"),
        Feature("base", "torch.compile(fullgraph=True)", FULLGRAPH),
        Feature("shared prompt", "context parallelism", note="`ContextParallelCache`; decoding too"),
        Feature("shared prompt", "sliding windows", SPREAD_WINDOWS),
        Feature("shared prompt", "RoPE of type dynamic or longrope", SPREAD_ROPE),
        Feature("shared prompt", "beside tensor parallelism", SPREAD_HEADS),
        Feature("shared prompt", "layers that share a choice", SPREAD_GATES),
        Feature("shared prompt", "a second long prompt", SPREAD_TURN),
        Feature("shared prompt", "caches that are copied, cropped or reordered, as by beams", SPREAD_CHANGED),
        Feature("shared prompt", "with a gradient", SPREAD_GRADIENT),
        Feature("training", "the model", note="the choice of blocks is a constant of the gradient"),
        Feature("training", "activation checkpointing"),
        Feature("training", "DDP and FSDP2, before or after attaching", note="attached gates do not learn"),
        Feature("training", "gates, and calibrating them, under tensor parallelism", SPLIT_LEARNING),
        Feature("training", "attention dropout", DROPOUT),
    )
