"""Gates on the Hugging Face hub, with a card that says what they are and how to use them."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from torch import nn

from seerattention.hosts.transformers.checkpoint import gates_of, save_gates
from seerattention.hosts.transformers.gates import Gates
from seerattention.hosts.transformers.load import outside
from seerattention.policies import Policy

#: A policy for decoding where gates come without one.
BUDGET = "token_budget:2048"

#: Phases in words.
PHASES = {"prefill": "prefill", "decode": "decoding", "both": "prefill and decoding"}

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def push_to_hub(
    gates: Gates | nn.Module,
    repo_id: str,
    *,
    policy: Policy | str | None = None,
    data: str | None = None,
    recipe: Mapping[str, Any] | str | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    license: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
) -> str:
    """Upload gates and a card generated for them; `load_gates` reads them from there.

    Args:
        gates: The gates, or a model that uses some.
        repo_id: ``owner/name``; made if it is not there.
        policy: The policy to use them with by default.
        data: See `model_card`, as for ``recipe`` and ``results``.
        recipe: How they were trained.
        results: What was measured.
        license: The gates' licence, a name that the hub knows.
        private: Whether a new repository is private.
        token: The hub's access token; default the one saved by ``hf auth login``.

    Returns:
        The address of the commit.

    Raises:
        TypeError: If the model uses something other than gates.
        ValueError: If ``repo_id`` is no hub id, the rows of ``results`` have different columns, or
            `save_gates` refuses the gates.
    """
    _check_id(repo_id)
    found, chosen, decoding = gates_of(gates, policy)
    card = model_card(
        found, repo_id, policy=chosen, data=data, recipe=recipe, results=results, license=license
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "gates"
        save_gates(found, folder, policy=chosen, decode_policy=decoding)
        (folder / "README.md").write_text(card, encoding="utf-8")
        api = HfApi(token=token)
        message = f"Gates for {found.base.name or 'an unnamed model'}"
        with outside(f"the gates cannot be pushed to {repo_id}"):
            repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    return str(commit.commit_url)


def check_login(repo_id: str) -> None:
    """Refuse before any work what could not be pushed after it: no hub id, or nobody is logged in."""
    _check_id(repo_id)
    try:
        with outside("the hub cannot be asked who you are"):
            HfApi().whoami()
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        raise ValueError("pushing to the hub needs a login with write access: run `hf auth login`") from error


def _check_id(repo_id: str) -> None:
    if not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id must be owner/name, got {repo_id!r}")


def model_card(
    gates: Gates,
    repo_id: str,
    *,
    policy: Policy | str | None = None,
    data: str | None = None,
    recipe: Mapping[str, Any] | str | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    license: str | None = None,
) -> str:
    """Write the card of gates: base model, design, data, recipe, results, use.

    Args:
        gates: The gates.
        repo_id: Where they will be, for the lines that load them.
        policy: The policy to use them with by default; else the one saved with them.
        data: What they were trained on, in words.
        recipe: How: settings by name, or words.
        results: Rows of what was measured, all with the same columns; numbers are printed as they are.
        license: Their licence, a name that the hub knows.

    Returns:
        Markdown with the hub's metadata at its head.

    Raises:
        ValueError: If the rows of ``results`` have different columns.
    """
    base, chosen = gates.base, str(policy or gates.policy or "")
    named = base.name if HUB_ID.fullmatch(base.name) else None
    head = ModelCardData(
        base_model=named,
        library_name="seerattention",
        license=license,
        pipeline_tag="text-generation",
        tags=["seerattention", "sparse-attention", "long-context"],
    )
    parameters = sum(p.numel() for p in gates.parameters())
    c = gates.config
    sections = {
        "Base model": f"`{base.name or 'unnamed'}` ({base.model_type}, {base.num_layers} layers, "
        f"{base.num_heads} query and {base.num_kv_heads} KV heads of {base.head_dim}); fingerprint of its "
        f"attention weights: {f'`{base.fingerprint}`' if base.fingerprint else 'not known'}.",
        "Design": f"{len(gates.layers)} gates for {PHASES[c.phase]}, {parameters:,} parameters in all; "
        f"blocks of {c.block_size} tokens, {_pooled('queries', c.q_pool, c.q_sub)}, "
        f"{_pooled('keys', c.k_pool, c.k_sub)}, {c.dim} numbers each"
        + (f"; taught for positions up to {gates.reach:,}." if gates.reach else "."),
        "Data": data or "Not recorded.",
        "Recipe": _settings(recipe),
        "Results": _table(results),
        "Use": _use(named or base.name or "the/base-model", repo_id, gates, chosen),
    }
    text = "\n\n".join(f"## {title}\n\n{body}" for title, body in sections.items())
    return str(ModelCard(f"---\n{head.to_yaml()}\n---\n\n# Gates for {base.name or 'a model'}\n\n{text}\n"))


def _pooled(what: str, pools: Sequence[str], tokens: int) -> str:
    """Return how queries or keys are summarised, in words."""
    if tokens == 1:
        return f"{what} each alone"
    return f"{what} pooled by {', '.join(pools)} over {tokens} tokens"


def _settings(recipe: Mapping[str, Any] | str | None) -> str:
    if not recipe:
        return "Not recorded."
    if isinstance(recipe, str):
        return recipe
    return "\n".join(["| setting | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in recipe.items())])


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "None recorded: measure them on your own prompts before you rely on these gates."
    columns = list(rows[0])
    for row in rows:
        if list(row) != columns:
            raise ValueError(f"all results must have the columns {columns}, one has {list(row)}")
    lines = [columns, ["---"] * len(columns), *([row[c] for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _use(base: str, repo_id: str, gates: Gates, policy: str) -> str:
    told = {"prefill": f'"{policy or "top_k:0.1"}"', "decode": f'decode="{gates.decode_policy or BUDGET}"'}
    arguments = ", ".join(told[phase] for phase in gates.config.phases)
    does = {"prefill": "Long prompts are prefilled sparsely", "decode": "Every token decodes sparsely"}
    said = "; ".join(does[phase] for phase in gates.config.phases)
    return f"""```python
from transformers import AutoModelForCausalLM
from seerattention import attach, load_gates

model = AutoModelForCausalLM.from_pretrained("{base}")
attach(model, load_gates("{repo_id}"), {arguments})
```

{said}; `seerattention.detach(model)` leaves the model as it was."""
