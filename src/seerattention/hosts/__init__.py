"""What knows a framework, and only that framework; one folder each."""
