"""x86-64 CPUs: a kernel in C++, which ``seerattention build`` compiles once for the machine; forward only.

The kernel is in ``kernels/native.cpp``; docs/kernels.md has its design and its measurements.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from seerattention.ops.options import Options
from seerattention.selection import BlockSelection

#: A compiler of PyTorch cannot look into it.
OPAQUE = True

#: Kinds of CPUs, the best first: what the system calls their instructions, which compilers call the same but
#: for underscores. Each has its own library, so that machines may share a home.
LEVELS = {
    "avx512_bf16": "avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_bf16",
    "avx512": "avx2 fma f16c avx512f avx512bw avx512dq avx512vl",
    "avx2": "avx2 fma f16c",
}

FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp")

SOURCES = Path(__file__).parent / "kernels"

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

#: A tile's scores are of 16 keys at least and its output of 16 numbers of a head; the most it has room for.
STEP, MOST_DIM = 16, 256


class _Call(ctypes.Structure):
    """What the kernel is told; the same fields in the same order in native_call.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in "q k v out lse bits sinks lengths pages".split()),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in "q k v out".split()),
        *(
            (name, ctypes.c_int64)
            for name in "batch heads kv_heads dim sequences selections selection_heads rows words block_q "
            "block_k queries dtype threads page_tokens pages_each".split()
        ),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
    )


def unsupported(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options) -> list[str]:
    """Return the reasons why this backend cannot run."""
    if q.device.type != "cpu":
        return [f"it runs on a CPU, not on {q.device.type}"]
    reasons = []
    if q.dtype not in DTYPES:
        reasons.append(f"it takes float32, bfloat16 and float16, not {q.dtype}")
    if q.shape[3] % STEP or q.shape[3] > MOST_DIM:
        reasons.append(f"head_dim must be a multiple of {STEP} up to {MOST_DIM}, got {q.shape[3]}")
    if selection.block_size[1] % STEP:
        reasons.append(f"KV blocks must be of a multiple of {STEP} tokens, got {selection.block_size[1]}")
    inputs = (q, k, v, options.sinks)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        reasons.append("it has no backward")
    if missing := _missing():
        reasons.append(missing)
    return reasons


def run(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Return softmax attention over the selected causal tokens, ``[B, Hq, Tq, D]``, and its lse if asked.

    Raises:
        IndexError: If keys are in a page that there is not.
        MemoryError: If there is no room for a packed copy of a few KV heads.
    """
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if options.return_lse else None
    bits = selection.bits.contiguous()
    sinks = None if options.sinks is None else options.sinks.to(torch.float32).contiguous()
    lengths = torch.tensor(options.rows.known, dtype=torch.int64)
    pages = None if options.pages is None else _checked(options.pages, k, lengths)
    pointers = (None if x is None else x.data_ptr() for x in (q, k, v, out, lse, bits, sinks, lengths, pages))
    strides = ((ctypes.c_int64 * 3)(*x.stride()[:3]) for x in (q, k, v, out))
    batch, heads, queries, dim = q.shape
    call = _Call(
        *pointers, *strides, batch, heads, k.shape[1], dim, len(lengths), *bits.shape, *selection.block_size,
        queries, DTYPES[q.dtype], torch.get_num_threads(), k.shape[2], 0 if pages is None else pages.shape[1],
        options.scale, options.softcap or 0.0,
    )  # fmt: skip
    if _kernel(library(level()))(ctypes.byref(call)):
        raise MemoryError(f"no room to pack {k.shape[2]} keys and values for the CPU's kernel")
    return out, lse


def _checked(pages: Tensor, k: Tensor, lengths: Tensor) -> Tensor:
    """Return a block table behind one another; the kernel does not check it."""
    used = torch.arange(pages.shape[1]) * k.shape[2] < lengths[:, 1:]
    wrong = pages[used.expand_as(pages) & ((pages < 0) | (pages >= len(k)))]
    if len(wrong):
        raise IndexError(f"pages name page {int(wrong[0])}, but k and v have {len(k)}")
    return pages.contiguous()


def build() -> Path:
    """Compile the kernel for this machine, if that is not done yet, and return its library.

    Raises:
        NotImplementedError: If the machine has no code here, no compiler, or one that fails.
        OSError: If what was compiled cannot be loaded, or there is no room for it.
    """
    to = library(level())
    if to.exists():
        return to
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NotImplementedError("a C++ compiler is needed, g++ or clang++, and none is on the PATH")
    to.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all, whoever else builds it meanwhile.
    with tempfile.TemporaryDirectory(dir=to.parent) as folder:
        made = Path(folder) / to.name
        command = [compiler, *_flags(level()), str(SOURCES / "native.cpp"), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr.strip()]
            raise NotImplementedError(f"{compiler} cannot compile the CPU's kernel: {said[0]}")
        _kernel(made)
        made.replace(to)
    return to


def level() -> str:
    """Return the best of ``LEVELS`` that this machine's CPU has.

    Raises:
        NotImplementedError: If it has none, or the system does not say.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise NotImplementedError(
            f"its code is for x86-64 on Linux, not for {platform.machine()} on {platform.system()}"
        )
    has = _cpu()
    for name, needs in LEVELS.items():
        if has.issuperset(needs.split()):
            return name
    raise NotImplementedError("its code needs a CPU with AVX2, FMA and F16C")


def library(name: str) -> Path:
    """Return where the library of one of ``LEVELS`` is once built: beside what else PyTorch keeps.

    Its name has a digest of all that it is made from.
    """
    parts = [" ".join(_flags(name)).encode(), *(p.read_bytes() for p in sorted(SOURCES.glob("native*")))]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    return Path(torch.hub.get_dir()).with_name("seerattention") / f"{name}-{digest}.so"


def _flags(name: str) -> list[str]:
    return [*FLAGS, *(f"-m{word.replace('_', '')}" for word in LEVELS[name].split())]


@functools.cache
def _cpu() -> frozenset[str]:
    """Return the names of the CPU's instructions, of the first one where they are several."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


# What lies in a folder is no business of a compiler of PyTorch.
@torch.compiler.assume_constant_result
def _missing() -> str | None:
    """Say why there is no kernel on this machine, if there is none."""
    try:
        found = library(level())
        if not found.exists():
            return "it is not compiled on this machine; `seerattention build` does that in seconds"
        _kernel(found)
    except (NotImplementedError, OSError) as error:
        return str(error)
    return None


@functools.cache
def _kernel(path: Path) -> Callable[..., int]:
    """Return the function of a library.

    Raises:
        OSError: If the library cannot be loaded.
    """
    return ctypes.CDLL(str(path)).seerattention_attend
