"""Gates in the published layout: a folder with ``config.json`` and ``attn_gate_weights.pth``.

Two kinds: prefill gates score blocks of queries; decode gates score single queries, one selection per
KV head. The file of weights says which kind it is. ``config.json`` is the base model's own configuration
with settings named ``seerattn_...`` added; those of an evaluation (``seerattn_start_layer``, ...) say
nothing about the gates and are not read.

Source: the published code, microsoft/SeerAttention at aba03e3.
"""

from __future__ import annotations

import dataclasses
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seerattention.gate import GateConfig
from seerattention.hosts.transformers.base import BaseInfo
from seerattention.hosts.transformers.gates import KEY, Gates, check_layers, check_weights
from seerattention.policies import Policy, Threshold, TokenBudget, TopK, check_decodes

PUBLISHED_WEIGHTS = "attn_gate_weights.pth"
PREFIX = "seerattn_"
BLOCK_SIZES = (16, 32, 64, 128)

#: A gate's parameters here -> in the file, for each kind.
NAMES = {
    "prefill": {"linear_q": "mask_linear_q", "linear_k": "mask_linear_k"},
    "decode": {
        "linear_q": "attngate_linear_q",
        "linear_k": "attngate_linear_k",
        "norm_q": "attngate_qnorm",
        "norm_k": "attngate_knorm",
    },
}


def is_published(config: Any) -> bool:
    """Whether the content of a ``config.json`` is of the published layout."""
    return isinstance(config, dict) and any(str(key).startswith(PREFIX) for key in config)


def read_published(folder: Path, config: dict[str, Any]) -> Gates:
    """Read gates of the published layout from a folder, the content of whose ``config.json`` is given.

    They are on the CPU, in the precision they are stored in, with the policy that their settings name for
    their phase, and rotate by plain RoPE until they are attached, then as the model does.

    Raises:
        FileNotFoundError: If there are no weights.
        ValueError: If a setting or a weight is missing, unknown or does not fit, or the file of weights
            holds anything but tensors. Code in it is never run.
    """
    file = folder / PUBLISHED_WEIGHTS
    weights = _tensors(file)
    normed = any(".attngate_qnorm." in key or ".attngate_knorm." in key for key in weights)
    kind = "decode" if any(".attngate_" in key for key in weights) else "prefill"
    try:
        base = _base(config)
        gate = _prefill_gate(config, base) if kind == "prefill" else _decode_gate(config, base, normed)
        policy = published_policy(config, kind)
        if kind == "decode" and policy is not None:
            check_decodes(policy, gate.block_size)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"the settings of the published gates in {folder / 'config.json'} cannot be used: {reason}; "
            "download the gates again"
        ) from error
    # Without memory until the file is known to fit.
    with torch.device("meta"):
        gates = Gates(gate, base, list(range(base.num_layers)))
    text = str(policy) if policy else None
    gates.policy, gates.decode_policy = (text, None) if kind == "prefill" else (None, text)
    own = {name: (_key(kind, name), value) for name, value in gates.state_dict().items()}
    check_weights(file, weights, {key: _shape(key, value, gate) for key, value in own.values()})
    kinds = {value.dtype for value in weights.values()}
    # The precision that holds every weight as it is stored.
    dtype = kinds.pop() if len(kinds) == 1 else torch.float32
    # A group's query matrices lie one below the other, in the order its queries are concatenated in.
    # Copies, because tensors of a file may share memory.
    found = {
        name: weights[key].to(dtype).reshape(value.shape).clone().contiguous()
        for name, (key, value) in own.items()
    }
    gates.load_state_dict(found, assign=True)
    return gates


def published_policy(config: dict[str, Any], kind: str) -> Policy | None:
    """Return the policy that settings name; None where they read everything, leaving the choice to users."""
    method = config.get("seerattn_sparsity_method", "threshold")
    dense_last = bool(config.get("seerattn_last_block_dense", True)) and kind == "prefill"
    rows = 2 if dense_last else 0
    if method == "threshold":
        value = config.get("seerattn_threshold", 0.0)
        return None if value == 0 else Threshold(float(value), dense_last_rows=rows)
    if method == "nz_ratio":
        value = config.get("seerattn_nz_ratio", 1.0)
        return None if value == 1 else TopK(float(value), dense_last_rows=rows)
    if method == "token_budget":
        return TokenBudget(config.get("seerattn_token_budget", 4096), dense_last_rows=rows)
    raise ValueError(f"seerattn_sparsity_method is {method!r}, not threshold, nz_ratio or token_budget")


def _base(config: dict[str, Any]) -> BaseInfo:
    """Describe the base model; its weights are not at hand, so there is no fingerprint."""
    name = config["base_model"]
    if not isinstance(name, str) or not name:
        raise ValueError(f"base_model must be the name of a model, got {name!r}")
    heads = config["num_attention_heads"]
    for key in ("num_attention_heads", "num_hidden_layers"):
        if not isinstance(config[key], int) or config[key] < 1:
            raise ValueError(f"{key} must be a whole number >= 1, got {config[key]!r}")
    check_layers(config["num_hidden_layers"])
    return BaseInfo(
        name=name,
        model_type=config["model_type"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        fingerprint="",
    )


def _prefill_gate(config: dict[str, Any], base: BaseInfo, gate_type: str | None = None) -> GateConfig:
    block = config["seerattn_gate_block_size"]
    if block not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise ValueError(f"seerattn_gate_block_size is {block!r}, published gates have one of {sizes} tokens")
    rope = config.get("rope_parameters") or {}
    return GateConfig.published(
        gate_type or config.get("seerattn_gate_type", "Qavg_Kmaxminavg"),
        num_heads=base.num_heads,
        num_kv_heads=base.num_kv_heads,
        head_dim=base.head_dim,
        block_size=block,
        gate_dim=config["seerattn_gate_hidden_size"],
        force_double=bool(config.get("seerattn_gate_force_double", False)),
        rope_theta=float(config.get("rope_theta") or rope.get("rope_theta", 10000.0)),
    )


def _decode_gate(config: dict[str, Any], base: BaseInfo, normed: bool) -> GateConfig:
    if (merged := config.get("seerattn_q_head_pooling_type", "Qproj")) != "Qproj":
        raise ValueError(f"seerattn_q_head_pooling_type is {merged!r}, this version reads Qproj alone")
    pools = config.get("seerattn_k_seq_pooling_type", "Kmaxminavg")
    return dataclasses.replace(
        _prefill_gate(config, base, f"Qavg_{pools}"),
        q_proj=True,
        per_kv_head=True,
        # Every query is scored at its own position, as while decoding.
        q_sub_block=1,
        rope=bool(config.get("seerattn_use_rope", True)),
        # The first files with norms did not say so.
        qk_norm=bool(config.get("seerattn_use_qk_norm", normed)),
        phase="decode",
    )


def _key(kind: str, name: str) -> str:
    """Return the published key of a parameter."""
    _, layer, module, parameter = name.split(".")
    return KEY.format(layer, f"{NAMES[kind][module]}.{parameter}")


def _shape(key: str, value: Tensor, gate: GateConfig) -> tuple[int, ...]:
    """Return the published shape of a parameter."""
    if gate.per_kv_head and key.endswith("linear_q.weight"):
        return gate.num_kv_heads, gate.num_heads // gate.num_kv_heads, gate.head_dim, gate.dim
    return tuple(value.shape)


def _tensors(file: Path) -> dict[str, Tensor]:
    """Read a file of tensors by name; whatever else it holds is refused and not executed."""
    again = "; download the gates again"
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} holds published settings but no {file.name}{again}")
    if not _plain_zip(file):
        raise ValueError(
            f"{file} is damaged, compressed, or a bare pickle, which may hold code and was not executed"
            f"{again}, or ask for them in safetensors"
        )
    try:
        found = torch.load(file, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(
            f"{file} holds more than tensors{f' ({named[1]})' if named else ''}: such a file can run code, "
            "so it was not executed; ask its author for a file of tensors alone or for safetensors"
        ) from error
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged or of another kind ({type(error).__name__}){again}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"{file} holds a {type(found).__name__}, not tensors by name{again}")
    for key, value in found.items():
        plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not plain or value.dtype not in (torch.float32, torch.bfloat16):
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{key} in {file} is {kind}, not a plain tensor of float32 or bfloat16{again}")
    return found


def _plain_zip(file: Path) -> bool:
    """Whether a file is a zip whose content is no larger than itself, as torch writes them."""
    try:
        with zipfile.ZipFile(file) as content:
            return sum(one.file_size for one in content.infolist()) <= file.stat().st_size
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error):
        return False
