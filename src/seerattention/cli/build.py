"""``seerattention build``: compile for this machine what runs faster so."""

from __future__ import annotations

from seerattention.cli._show import console_of


def run() -> None:
    """Compile the kernel of block-sparse attention for this machine's CPU; prefill uses it from then on.

    That takes seconds and a C++ compiler, g++ or clang++. Without it prefill on a CPU is PyTorch's products.
    """
    from seerattention.ops.block_sparse_attention import native

    made = native.build()
    console_of().print(f"the CPU's kernel ({native.level()}) is in {made}", soft_wrap=True, markup=False)
