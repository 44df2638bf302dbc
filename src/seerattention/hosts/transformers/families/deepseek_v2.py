"""deepseek_v2: refused, since gates and kernels expect keys and values of one width per head."""

from transformers import PreTrainedConfig


def unsupported(config: PreTrainedConfig) -> str | None:
    """Return why models of this family are refused."""
    return (
        "multi-head latent attention rotates a key part that all heads share, apart from the rest of a key, "
        "and its keys are wider than its values, while gates and kernels expect one width"
    )
