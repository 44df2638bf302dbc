r"""Attached gates as a model of lm-evaluation-harness: its tasks through its own command line.

    python -m seerattention.evals.lm_eval run --model seerattention \
        --model_args pretrained=MODEL,gates=FOLDER,density=0.1 --tasks lambada_openai

is lm-eval's ``lm_eval`` command with the model ``seerattention`` known to it; everything but
``--model_args`` is lm-eval's own. `SeerAttentionLM` has the arguments. Needs the extra ``eval``.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from seerattention.evals.config import POLICY
from seerattention.hosts.transformers import Gates, attach, usage
from seerattention.measure import bundled
from seerattention.measure.bundled import BUNDLED
from seerattention.measure.observe import Watch
from seerattention.policies import parse

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models import huggingface
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error}; this needs lm-evaluation-harness: pip install 'seerattention[eval]'", name=error.name
    ) from error

#: lm-eval's Hugging Face model; the decorator on it hides its type.
HFLM: Any = huggingface.HFLM

#: The value of ``gates`` that leaves the model dense.
NONE = "none"

# Below lm-eval's own, whose command line shows what it logs.
logger = logging.getLogger("lm_eval.models.seerattention")


@register_model("seerattention")
class SeerAttentionLM(HFLM):
    """lm-eval's Hugging Face model with gates attached, or dense to compare with.

    Prompts are prefilled sparsely however short they are, for what is asked is how good the gates are;
    decoding is dense. Batches are padded and masked, so that no answer depends on its batch.

    Args:
        pretrained: Model folder or hub id, or ``bundled``.
        gates: Folder or hub id of gates, or ``bundled``; ``none`` for dense attention.
        policy: Text form of a policy, ``calibrated`` included; in lm-eval's ``key=value`` form in quotes
            where it has knobs. Default the one saved with the gates.
        density: Fraction of the blocks to read by top-k with the first block always read, instead of
            ``policy``.
        min_tokens: Shorter prompts are dense; see `attach`.
        check_base: See `attach`.
        batch_size: Requests per batch, a number.
        kwargs: Everything else that lm-eval's ``hf`` takes.

    Raises:
        FileNotFoundError: If there are no gates in the folder.
        ValueError: If gates, policy, density or batch size are missing, unknown or do not fit.
    """

    def __init__(
        self,
        pretrained: str = "",
        gates: str | None = "",
        policy: str | None = None,
        density: float | None = None,
        min_tokens: int = 0,
        check_base: bool = True,
        batch_size: int | str = 1,
        **kwargs: Any,
    ) -> None:
        if not pretrained:
            raise ValueError("model_args must name the model: pretrained=<folder or hub id>")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(
                f"batch_size must be a number with the model seerattention, got {batch_size!r}: how much "
                "memory a batch takes depends on what the gates choose"
            )
        loaded, text = _gates(gates, policy, density)
        where = str(bundled.TEACHER) if pretrained == BUNDLED else pretrained
        super().__init__(where, batch_size=batch_size, **kwargs)
        self.watch = Watch()
        self.policy = text
        if loaded is not None:
            attach(self.model, loaded, text, min_tokens=min_tokens, observe=self.watch, check_base=check_base)

    @property
    def density(self) -> float:
        """Fraction of the causally valid blocks that prefills read so far; 1 if none ran sparse."""
        return self.watch.density

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes beside its results: policy and density as measured, among others.

        Of several processes this is about the first one's share.
        """
        ran = usage(self.model) if self.policy else {}
        found = {"policy": self.policy or "dense", "density": self.density, "attention_calls": ran}
        logger.info("attention: %s, density measured %.4f, calls of layers %s", *found.values())
        if self.policy and not ran.get("sparse"):
            logger.warning("no prompt was sparse: these are the results of dense attention")
        return {**super().get_model_info(), **found}

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, whether it is the most likely) of each continuation.

        lm-eval pads without a mask, which causal attention does not notice and blocks would; and it keeps
        the logits of all tokens, which at the lengths that sparse attention is for take more memory than
        the model.
        """
        # As in lm-eval, inputs that differ in their last token only, as single-token choices do, run once.
        same: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens, the model takes 1 to {self.max_length}"
                )
            same.setdefault(tuple((context + continuation)[-self.max_length - 1 : -1]), []).append(i)
        inputs = sorted(same, key=len, reverse=True)
        answers: dict[int, tuple[float, bool]] = {}
        size = override_bs or int(self.batch_size)
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="loglikelihood") as bar:
            for first in range(0, len(inputs), size):
                rows = inputs[first : first + size]
                wanted = [max(len(requests[i][2]) for i in same[row]) for row in rows]
                for row, shares in zip(rows, self._log_shares(rows, wanted), strict=True):
                    for i in same[row]:
                        text, _, continuation = requests[i]
                        answers[i] = _likelihood(shares, continuation)
                        if text is not None:
                            self.cache_hook.add_partial("loglikelihood", text, answers[i])
                        bar.update()
        return [answers[i] for i in range(len(requests))]

    @torch.inference_mode()
    def _log_shares(self, rows: list[tuple[int, ...]], wanted: list[int]) -> list[Tensor]:
        """Return log-probabilities behind the last ``wanted`` tokens of each row, fp32 ``[wanted, V]``."""
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        ranges = [range(len(row) - count, len(row)) for row, count in zip(rows, wanted, strict=True)]
        keep = torch.tensor(sorted(set().union(*ranges)))
        with torch.autocast(
            self.device.type, self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        ):
            logits = self.model(
                ids.to(self.device),
                attention_mask=mask.to(self.device),
                use_cache=False,
                logits_to_keep=keep.to(self.device),
            ).logits
        starts = torch.searchsorted(keep, torch.tensor([r.start for r in ranges])).tolist()
        return [
            F.log_softmax(part[start : start + count].float(), -1)
            for part, start, count in zip(logits, starts, wanted, strict=True)
        ]


def _likelihood(shares: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Return the answer for a continuation from log-probabilities at its last tokens' places."""
    shares = shares[-len(continuation) :]
    tokens = torch.tensor(continuation, device=shares.device)
    found = shares.gather(-1, tokens[:, None]).double().sum()
    return float(found), bool((shares.argmax(-1) == tokens).all())


def _gates(gates: str | None, policy: str | None, density: float | None) -> tuple[Gates | None, str | None]:
    """Return the gates and the policy that arguments name, None and None for dense attention."""
    if gates == "":
        raise ValueError(
            f"model_args must name the gates: gates=<folder or hub id>, or gates={NONE} for dense attention"
        )
    if gates is None or str(gates).lower() == NONE:
        if policy is not None or density is not None:
            raise ValueError(
                f"gates={NONE} is dense attention, which has no policy or density; leave them out"
            )
        return None, None
    if policy is not None and density is not None:
        raise ValueError(f"give policy or density, not both; got {policy!r} and {density}")
    if density is not None:
        policy = POLICY.format(density=density)
    loaded = bundled.named_gates(gates)
    policy = policy or loaded.policy
    if policy is None:
        raise ValueError("these gates were saved without a policy; give density=0.1 or a policy")
    return loaded, str(parse(str(policy), loaded.calibration))


def main() -> None:
    """Run lm-eval's command line."""
    cli_evaluate()


if __name__ == "__main__":
    main()
