"""``python -m seerattention.cli``, what ``accelerate launch -m`` and ``torchrun -m`` start."""

from seerattention.cli import main

if __name__ == "__main__":
    main()
