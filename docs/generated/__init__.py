"""What the generated parts of README.md and docs/ say, made from result files: a module per subject."""
