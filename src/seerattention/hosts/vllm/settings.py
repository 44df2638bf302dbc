"""What an engine is told to serve: ``additional_config`` of vLLM, or a key of the model's ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from seerattention.settings import build

#: The key under which vLLM's configuration, or the model's, holds the settings.
KEY = "seerattention"

#: Kinds of device for which vLLM, in the versions that are served, plans pages of summaries.
KEEPS = ("cpu",)


@dataclass(frozen=True)
class Settings:
    """How prompts are computed.

    Attributes:
        gates: Folder of the gates, or a hub id; in a model's own configuration first of all a folder in that
            of the model.
        policy: Which blocks are read, e.g. ``top_k:0.1``; default the one saved with the gates.
        min_tokens: Prompts of fewer tokens are dense; default what was measured on this kind of device.
        check_base: Refuse gates of another model. A fine-tuned variant of theirs may do without.
        summaries: ``kept`` beside the keys, in pages of their own, which takes memory and saves time where
            prompts come in pieces; or ``made`` again from the keys in every piece, as by default where vLLM
            plans no such pages.
        aligned: End pieces of prompts where blocks end, so that every prompt is read as if it came whole,
            by a scheduler of this package in the place of vLLM's.
        backend: What computes sparse attention, a backend of ``block_sparse_attention``.
    """

    gates: str
    policy: str | None = None
    min_tokens: int | None = None
    check_base: bool = True
    summaries: Literal["kept", "made"] = "kept"
    aligned: bool = False
    backend: str = "auto"

    @classmethod
    def of(cls, config: Any) -> Settings | None:
        """Read an engine's settings, None if it has none.

        Args:
            config: vLLM's configuration of the engine.

        Raises:
            ValueError: If a setting is unknown or of another type.
        """
        extra = config.additional_config
        given = extra.get(KEY) if isinstance(extra, Mapping) else None
        where, model = "additional_config", config.model_config
        if given is None:
            given, where = getattr(model.hf_config, KEY, None), "config.json of the model"
        if given is None or given is False:
            return None
        if not isinstance(given, Mapping):
            raise ValueError(
                f"{KEY} in {where} must be settings, e.g. {{'gates': 'folder'}}, or false, got {given!r}"
            )
        settings = build(cls, given, f"{KEY} in {where}", f"{KEY}.")
        if "summaries" not in given and config.device_config.device_type not in KEEPS:
            settings = replace(settings, summaries="made")
        beside = Path(model.model, settings.gates)
        if where.endswith("model") and beside.is_dir():
            return replace(settings, gates=str(beside))
        return settings
