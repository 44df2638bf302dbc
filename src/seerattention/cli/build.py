"""``seerattention build``: compile for this machine what runs faster so."""

from __future__ import annotations

from seerattention.cli._show import console_of


def run() -> None:
    """Compile the kernels for this machine's CPU; prefill uses them from then on.

    That takes seconds and a C++ compiler, g++ or clang++. Without them prefill on a CPU runs in PyTorch.
    """
    from seerattention.ops import native

    made = native.build()
    console_of().print(f"the CPU's kernels ({native.level()}) are in {made}", soft_wrap=True, markup=False)
