"""What several processes share of one model: the heads that each has."""
