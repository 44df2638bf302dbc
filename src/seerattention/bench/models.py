"""Models with random weights, to time what does not depend on them.

They attend almost evenly, and ``top_k`` reads as much whatever the scores are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# What is needed for a model comes late: commands list the shapes before anything else.
if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, PreTrainedModel

#: Sizes by name; the first is that of Llama 3.1 8B.
SHAPES: dict[str, dict[str, int]] = {
    "llama-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "small": {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def random_config(shape: str, tokens: int = 2**17, layers: int | None = None, **settings: Any) -> LlamaConfig:
    """Return a configuration for texts of so many tokens, with fewer layers than the shape has if asked.

    Raises:
        ValueError: If there is no such shape.
    """
    from transformers import LlamaConfig

    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    sizes = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    rope = {"rope_type": "default", "rope_theta": 5e5}
    return LlamaConfig(**sizes, max_position_embeddings=tokens, rope_parameters=rope, **settings)


def random_model(config: LlamaConfig, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model made on a device, the same every time."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
