"""llama4_text: refused, since attached models have no chunked attention."""

from transformers import PreTrainedConfig


def unsupported(config: PreTrainedConfig) -> str | None:
    """Return why models of this family are refused."""
    return (
        "most of its layers attend within chunks of the text, for which attached models have no mask, and "
        "its full-attention layers scale queries by their position"
    )
