"""Kernels in C++ for x86-64 CPUs, which ``seerattention build`` compiles once for the machine, and no call.

docs/kernels.md has their design and their measurements. A backend adds `missing` to the reasons why it cannot
run, and calls what `function` returns.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from seerattention.files import UNFINISHED, check_writable, locked, write_whole

#: Kinds of CPUs, the best first: what the system calls their instructions, which compilers call the same but
#: for underscores. Each has its own library, so that machines may share a home.
LEVELS = {
    "avx512_bf16": "avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_bf16",
    "avx512": "avx2 fma f16c avx512f avx512bw avx512dq avx512vl",
    "avx2": "avx2 fma f16c",
}

FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp")

SOURCES = Path(__file__).parent

#: What kernels call the dtypes that they take.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def build() -> Path:
    """Compile the kernels for this machine, if that is not done yet, and return their library.

    Raises:
        NotImplementedError: If the machine has no code here, no compiler, or one that fails.
        OSError: If what was compiled cannot be loaded, or there is no room for it.
    """
    to = library(level())
    with suppress(OSError):
        _opened(to)
        return to
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NotImplementedError("a C++ compiler is needed, g++ or clang++, and none is on the PATH")
    try:
        check_writable(to)
    except OSError as error:
        raise OSError(f"{error}, by TORCH_HOME") from error
    with locked(to.parent, wait=True):
        # Who was waited for has perhaps built it.
        with suppress(OSError):
            _opened(to)
            return to
        with tempfile.TemporaryDirectory(prefix=f"{UNFINISHED}-", dir=to.parent) as folder:
            made = _compiled(compiler, Path(folder) / to.name)
            write_whole(to, lambda file: file.write_bytes(_sealed(made)))
    return to


def _compiled(compiler: str, made: Path) -> Path:
    """Compile a library that can be loaded."""
    command = [compiler, *_flags(level()), *map(str, sorted(SOURCES.glob("*.cpp"))), "-o", str(made)]
    # What it says in the language of its user may be in any encoding.
    told = {"text": True, "errors": "replace", "env": {**os.environ, "LC_ALL": "C"}}
    done = subprocess.run(command, capture_output=True, **told)
    if done.returncode:
        # A linker gives its reason before the compiler says that it failed.
        reasons = re.findall(r"^(?!.*warning:).*(?:error|\bld[.\w]*:).*$", done.stderr, re.MULTILINE)
        said = [*reasons, done.stderr.strip() or f"it ended by {done.returncode} without a word"][0]
        raise NotImplementedError(f"{compiler} cannot compile the CPU's kernels: {said}")
    ctypes.CDLL(str(made))
    return made


def _sealed(made: Path) -> bytes:
    """Return what a library holds and, after its end, a digest of it."""
    content = made.read_bytes()
    return content + hashlib.sha256(content).digest()


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
    return Path(torch.hub.get_dir()).with_name("seerattention") / f"{name}-{_digest(*_flags(name))}.so"


# Once: every call of a kernel asks, and what is read later may belong to another version than this code.
@functools.cache
def _digest(*flags: str) -> str:
    sources = sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])
    parts = [" ".join(flags).encode(), *(path.read_bytes() for path in sources)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _flags(name: str) -> list[str]:
    return [*FLAGS, *(f"-m{word.replace('_', '')}" for word in LEVELS[name].split())]


@functools.cache
def _cpu() -> frozenset[str]:
    """Return the names of the CPU's instructions, of the first one where they are several."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


# What lies in a folder is no business of a compiler of PyTorch.
@torch.compiler.assume_constant_result
def missing() -> str | None:
    """Say why there are no kernels on this machine, if there are none."""
    try:
        found = library(level())
        if not found.exists():
            return "it is not compiled on this machine; `seerattention build` does that in seconds"
        _opened(found)
    except (NotImplementedError, OSError) as error:
        return str(error)
    return None


def differentiated(*tensors: Tensor | None) -> bool:
    """Say whether a gradient is asked for, backwards or forwards: kernels have none."""
    given = [x for x in tensors if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return True
    return not torch.compiler.is_compiling() and any(unpack_dual(x).tangent is not None for x in given)


def address(x: Tensor | None) -> int | None:
    """Return where a tensor's numbers lie, None if there is no tensor.

    Raises:
        NotImplementedError: If they lie nowhere, as in a ``FakeTensorMode`` or ``torch.func.vmap``.
    """
    if x is None:
        return None
    # PyTorch refuses to tell for some, and tells nothing for others.
    with suppress(RuntimeError):
        if (at := x.data_ptr()) or not x.numel():
            return at
    raise NotImplementedError(
        f"the CPU's kernels read memory, and a {type(x).__name__} without any was given; name another backend"
    )


def function(name: str) -> Callable[..., int]:
    """Return a function of this machine's library, of which `missing` says whether there is one."""
    return getattr(_opened(library(level())), name)


@functools.cache
def _opened(path: Path) -> ctypes.CDLL:
    """Open a library.

    Raises:
        OSError: If it is not there, damaged or cannot be loaded.
    """
    content, again = path.read_bytes(), "`seerattention build` compiles it anew"
    # Loading a file that was cut kills the process.
    if content[-32:] != hashlib.sha256(content[:-32]).digest():
        raise OSError(f"{path} is damaged; {again}")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise OSError(f"{error}; {again}") from error
