"""What a sparse model is worth: perplexity, needles, recall and time, dense always beside sparse."""
