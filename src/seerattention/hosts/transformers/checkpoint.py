"""Gates on disk: a folder with ``gates.safetensors`` and ``config.json``, written all or nothing.

Calibrated gates have ``calibration.json`` too, which names the weights that it is for.

`load_gates` reads the published layout too; `published` has it.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from seerattention.files import UNFINISHED, atomic_folder, check_readable, read_json, write_json
from seerattention.gate import GateConfig
from seerattention.hosts.transformers.attach import active
from seerattention.hosts.transformers.base import BaseInfo
from seerattention.hosts.transformers.gates import (
    KEY,
    Gates,
    check_finite,
    check_layers,
    check_weights,
)
from seerattention.hosts.transformers.published import PUBLISHED_WEIGHTS, is_published, read_published
from seerattention.policies import Calibrated, Calibration, Policy, check_decodes, parse
from seerattention.settings import build, typed

WEIGHTS, CONFIG = "gates.safetensors", "config.json"
#: What a distillation measured, beside the gates.
RESULTS = "results.json"
#: Thresholds of the policy ``calibrated``.
CALIBRATION = "calibration.json"
FORMAT = 1


def save_gates(
    gates: Gates | nn.Module,
    folder: str | Path,
    *,
    policy: Policy | str | None = None,
    decode_policy: Policy | str | None = None,
) -> None:
    """Write gates, their configuration and their base model's identity.

    Args:
        gates: The gates, or a model that uses some: then with the policies it uses. Every process of a model
            that is spread over several has them whole, and one of them writes.
        folder: Where to; gates already there are replaced once everything is written.
        policy: The policy to use them with in prefill by default. Their calibration is written whichever
            it is.
        decode_policy: The same for decoding.

    Raises:
        FileExistsError: If something other than gates is there.
        OSError: If the folder cannot be written.
        TypeError: If the model uses something other than gates.
        ValueError: If a policy's text is not understood, that for decoding makes no sense there, a weight is
            not finite, or nothing is attached.
    """
    gates, policy, decode_policy = gates_of(gates, policy, decode_policy)
    calibration = policy.calibration if isinstance(policy, Calibrated) else gates.calibration
    policy = parse(policy, calibration) if isinstance(policy, str) else policy
    text = str(policy) if policy else gates.policy
    decoding = str(decode_policy) if decode_policy else gates.decode_policy
    weights = {key: value.detach().cpu().contiguous() for key, value in gates.named_weights().items()}
    check_finite(weights)
    config = {
        "format": FORMAT,
        "gate": gates.config.to_dict(),
        "layers": [index for index, _ in gates.items()],
        "base_model": gates.base.to_dict(),
        "policy": text,
        "decode_policy": decoding and _decoding(decoding, gates.config),
        "reach": gates.reach,
    }
    check_replaceable(Path(folder))
    with atomic_folder(folder) as temporary:
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / CONFIG, config)
        if calibration is not None:
            _write_calibration(temporary, calibration, _sha256(temporary / WEIGHTS))


def _decoding(policy: str, config: GateConfig) -> str:
    """Return a policy's text as policies write it; refuse one that cannot decode."""
    parsed = parse(policy)
    check_decodes(parsed, config.block_size)
    return str(parsed)


def save_calibration(folder: str | Path, policy: Calibrated) -> None:
    """Make a policy the one that saved gates are used with by default; their weights stay as they are.

    Args:
        folder: What `save_gates` wrote.
        policy: Its calibration is for these gates.

    Raises:
        FileNotFoundError: If there are no gates in the folder.
        OSError: If the folder cannot be written.
    """
    path = Path(folder)
    _require(path, WEIGHTS)
    config = {**read_json(path / CONFIG), "policy": str(policy)}
    # The configuration, which asks for the calibration, comes last.
    _write_calibration(path, policy.calibration, _sha256(path / WEIGHTS))
    write_json(path / CONFIG, config)


def _write_calibration(folder: Path, calibration: Calibration, weights: str) -> None:
    data = {"format": FORMAT, "gates_sha256": weights, **calibration.to_dict()}
    write_json(folder / CALIBRATION, data)


def _read_calibration(path: Path, layers: list[int], heads: int) -> Calibration | None:
    """Read the calibration beside gates, if there is one."""
    file = path / CALIBRATION
    if not file.is_file():
        return None
    try:
        data = read_json(file)
        if data.pop("format") != FORMAT:
            raise ValueError(f"this version reads format {FORMAT}")
        if data.pop("gates_sha256") != _sha256(path / WEIGHTS):
            raise ValueError(f"it is for other weights than those in {WEIGHTS}")
        calibration = Calibration.from_dict(data)
        if sorted(calibration.laws) != sorted(layers):
            raise ValueError(f"it is for layers {sorted(calibration.laws)}, the gates are for {layers}")
        if any(len(laws) != heads for laws in calibration.laws.values()):
            raise ValueError(f"it needs a law for each of {heads} heads in every layer")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged or not of these gates ({error}); calibrate the gates again, or delete the "
            f"file and choose another policy in {CONFIG}"
        ) from error
    return calibration


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def gates_of(
    gates: Gates | nn.Module, policy: Policy | str | None = None, decode_policy: Policy | str | None = None
) -> tuple[Gates, Policy | str | None, Policy | str | None]:
    """Return gates, or those that a model uses, and their policies for prefill and for decoding."""
    if isinstance(gates, Gates):
        return gates, policy, decode_policy
    used = active(gates)
    if not isinstance(used.scorers, Gates):
        raise TypeError(f"this model uses {used.scorers!r}, which is not gates and has no weights to save")
    # Gates of their own for decoding are saved by themselves.
    own = used.decode_policy if used.decoders is used.scorers else None
    return used.scorers, policy or used.policy, decode_policy or own


def check_replaceable(folder: Path) -> None:
    """Refuse to replace anything but gates: a folder is replaced as a whole, other files would be lost."""
    if folder.is_dir():
        # What a killed process left is no file of anybody's.
        names = {p.name for p in folder.iterdir() if not p.name.startswith(UNFINISHED)}
        other = sorted(names - {WEIGHTS, CONFIG, RESULTS, CALIBRATION})
    else:
        other = [folder.name] if folder.exists() else []
    if other:
        raise FileExistsError(
            f"{folder} holds other files than gates ({', '.join(other[:3])}); choose a new or empty folder"
        )


def holds_gates(folder: str | Path) -> bool:
    """Whether a folder holds gates, saved here or in the published layout."""
    return any(Path(folder, name).is_file() for name in (WEIGHTS, PUBLISHED_WEIGHTS))


def _local_folder(folder: str | Path) -> Path:
    """Return the folder itself, or where the hub client put the repository of that name."""
    path = Path(folder)
    if path.exists() or isinstance(folder, Path) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", folder):
        return path
    try:
        return Path(
            snapshot_download(folder, allow_patterns=[WEIGHTS, CONFIG, CALIBRATION, PUBLISHED_WEIGHTS])
        )
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"there is no folder {folder}, and it cannot be had from the hub ({reason}); check the name"
        ) from error


def load_gates(folder: str | Path) -> Gates:
    """Read gates from a folder or a hub id.

    Args:
        folder: What `save_gates` wrote, or gates in the published layout (``config.json`` and
            ``attn_gate_weights.pth``), here or on the hub.

    Returns:
        The gates on the CPU, in the precision they were saved in.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, keys or shapes are not those of its configuration, or a weight is
            not finite. Code in a published file is refused unexecuted.
    """
    path = _local_folder(folder)
    _require(path, CONFIG)
    try:
        config = read_json(path / CONFIG)
    except ValueError as error:
        raise _damaged(path, error) from error
    return read_published(path, config) if is_published(config) else _read(path, config)


def _require(path: Path, name: str) -> None:
    if not (path / name).is_file():
        raise FileNotFoundError(
            f"{path} holds no {name}; give a folder written by save_gates, or a hub id of one"
        )


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path / CONFIG} is damaged ({type(error).__name__}: {error}); save or download the gates again"
    )


def _read(path: Path, config: Any) -> Gates:
    """Read what `save_gates` wrote, its configuration already read."""
    _require(path, WEIGHTS)
    try:
        if config["format"] != FORMAT:
            raise ValueError(f"format {config['format']!r}, this version reads {FORMAT}")
        gate_config = GateConfig.from_dict(config["gate"])
        base = build(BaseInfo, config["base_model"], "base_model")
        layers = list(typed("layers", config["layers"], tuple[int, ...]))
        check_layers(len(layers))
        heads = gate_config.num_kv_heads if gate_config.per_kv_head else gate_config.num_heads
        # Files of earlier versions do not say it.
        reach = typed("reach", config.get("reach"), int | None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error
    calibration = _read_calibration(path, layers, heads)
    try:
        policy = config["policy"] and str(parse(config["policy"], calibration))
        # Files of earlier versions are for prefill and do not say so.
        decoding = config.get("decode_policy")
        decoding = decoding and _decoding(decoding, gate_config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error
    check_readable(path / WEIGHTS)
    try:
        weights = load_file(path / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(
            f"{path / WEIGHTS} is truncated or damaged ({error}); save or download the gates again"
        ) from error
    # Without memory until the file is known to fit.
    with torch.device("meta"):
        gates = Gates(gate_config, base, layers, policy, calibration, decoding, reach)
    check_weights(path / WEIGHTS, weights, {key: own.shape for key, own in gates.named_weights().items()})
    dtype = next(iter(weights.values())).dtype
    for index, gate in gates.items():
        own = {name: weights[KEY.format(index, name)].to(dtype, copy=True) for name in gate.state_dict()}
        gate.load_state_dict(own, assign=True)
    return gates
