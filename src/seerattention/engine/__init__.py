"""One attention layer in any host: the call, sparse or dense and why, and summaries beside a KV cache."""
