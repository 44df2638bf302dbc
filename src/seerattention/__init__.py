"""SeerAttention: learned block-sparse attention for long prompts."""
