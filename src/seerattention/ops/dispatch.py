"""Find the backends of an op and choose one by its reasons why not."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from seerattention.ops.language import INTERPRETED
from seerattention.selection import BlockSelection

P = ParamSpec("P")
R = TypeVar("R")

#: Kinds of devices that autocast knows. Looked up here: compilers of PyTorch 2.11 cannot enter the question.
AUTOCAST = frozenset(d for d in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(d))


def load_backends(package: str, path: Iterable[str]) -> dict[str, ModuleType]:
    """Import every backend of an op: the files of its folder, not starting with an underscore; no folders.

    Called when the op's package is imported, since importing at call time breaks
    ``torch.compile(fullgraph=True)``.
    """
    names = sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_") and not m.ispkg)
    return {name: importlib.import_module(f"{package}.{name}") for name in names}


def runs_everything(*_: object, **__: object) -> list[str]:
    """Be the ``unsupported`` of a backend that has no reason why not."""
    return []


def check_backend(backends: Mapping[str, ModuleType], backend: str) -> None:
    """Refuse the name of no backend.

    Raises:
        ValueError: If it is not ``auto`` and no backend has it.
    """
    if backend != "auto" and backend not in backends:
        raise ValueError(f"unknown backend {backend!r}; there are auto, {', '.join(backends)}")


def choose(
    backends: Mapping[str, ModuleType], order: tuple[str, ...], backend: str, **args: Any
) -> ModuleType:
    """Return the backend to run: the one named, or for ``auto`` the first of ``order`` that can.

    Its ``run`` takes the arguments that ``unsupported`` was asked about, by name.

    Raises:
        ValueError: If no backend has that name.
        NotImplementedError: If the named one, or every one of ``order``, has a reason why not.
    """
    check_backend(backends, backend)
    reasons = {}
    # Triton's interpreter is for tests, which name it.
    tried = tuple(name for name in order if not (INTERPRETED and name == "triton"))
    for name in tried if backend == "auto" else (backend,):
        reasons[name] = backends[name].unsupported(**args)
        if not reasons[name]:
            return backends[name]
    lines = [f"  {k}: {_describe(v)}" for k, v in args.items()]
    because = [f"  {name}: {'; '.join(why)}" for name, why in reasons.items()]
    raise NotImplementedError("\n".join(["no backend accepts", *lines, "because", *because]))


def outside_autocast(op: Callable[P, R]) -> Callable[P, R]:
    """Let an op compute in the dtypes of what it is given, as its contract says, also under autocast."""

    @functools.wraps(op)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next((x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), "cpu")
        if not (device in AUTOCAST and torch.is_autocast_enabled(device)):
            return op(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return op(*args, **kwargs)

    return run


def explain(backends: Mapping[str, ModuleType], **args: Any) -> dict[str, list[str]]:
    """Return every backend's reasons why it cannot run these arguments; an empty list means it can."""
    return {name: backend.unsupported(**args) for name, backend in backends.items()}


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {value.dtype} on {value.device}"
    if isinstance(value, BlockSelection):
        return f"{value.shape} blocks of {value.block_size}"
    return type(value).__name__ if isinstance(value, nn.Module) else repr(value)


def check_qkv(q: Tensor, k: Tensor, v: Tensor | None = None) -> None:
    """Check that q, k and v make causal grouped-query attention.

    Raises:
        TypeError: If dtypes differ or are not floating point.
        ValueError: If shapes or devices do not fit.
    """
    tensors = {"q": q, "k": k} | ({} if v is None else {"v": v})
    for name, x in tensors.items():
        if x.dim() != 4 or 0 in (x.shape[1], x.shape[3]):
            raise ValueError(f"{name} must be [B, H, T, D], H and D at least 1, got {list(x.shape)}")
        if x.dtype != q.dtype or not x.dtype.is_floating_point:
            got = ", ".join(f"{n} {t.dtype}" for n, t in tensors.items())
            raise TypeError(f"q, k and v must share one floating-point dtype, got {got}")
        if x.device != q.device:
            got = ", ".join(f"{n} on {t.device}" for n, t in tensors.items())
            raise ValueError(f"q, k and v must be on one device, got {got}")
    if v is not None and k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {list(k.shape)} and {list(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} must agree in batch and head dimension")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of KV heads, got {q.shape[1]} and {k.shape[1]}")


def check_cache(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check q, k and v as `check_qkv` does, but for what k and v have a first dimension of: pages, perhaps.

    Raises:
        TypeError: If dtypes differ or are not floating point.
        ValueError: If shapes or devices do not fit.
    """
    check_qkv(q[:1], k[:1], v[:1])
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {list(k.shape)} and {list(v.shape)}")


def check_selection(q: Tensor, k: Tensor, selection: BlockSelection) -> None:
    """Check that a selection is for the batch and the heads of q and k, on their device.

    Raises:
        ValueError: If it is not.
    """
    batch, heads = selection.shape[:2]
    if batch not in (1, q.shape[0]):
        raise ValueError(f"the selection is for a batch of {batch}, q has {q.shape[0]}")
    if heads not in (1, k.shape[1], q.shape[1]):
        raise ValueError(
            f"the selection has {heads} heads; it must have 1, {k.shape[1]} (KV heads) or "
            f"{q.shape[1]} (query heads)"
        )
    if selection.bits.device != q.device:
        raise ValueError(f"the selection is on {selection.bits.device}, q on {q.device}")
