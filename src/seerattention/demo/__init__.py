"""The whole method in minutes without a GPU: gates distilled live, compared, drawn."""
