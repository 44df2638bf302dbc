"""Thresholds per layer and head, fitted to a density, a recall or a rise of perplexity."""
