"""What a sparse model is worth, measured once: perplexity, needles, recall and time, dense beside sparse."""
