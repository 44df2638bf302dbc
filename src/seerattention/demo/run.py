"""The demo's measurements: one model, every method, quality and time in one run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from seerattention import baselines
from seerattention.gate import Scorer
from seerattention.hosts.transformers import (
    AttentionCall,
    Gates,
    attach,
    cache_argument,
    detach,
    logits_of,
    set_policy,
)
from seerattention.measure.compare import attached, measured
from seerattention.measure.layer import sparse_parts
from seerattention.measure.needle import NeedleDocument, NeedleTask
from seerattention.measure.observe import Watch
from seerattention.measure.perplexity import hidden_states
from seerattention.measure.retrieval import predictions
from seerattention.measure.timing import interleaved
from seerattention.policies import TopK
from seerattention.selection import BlockSelection
from seerattention.train import TextWindows
from seerattention.wording import TEACHERS, Wording

#: Query-block rows at the end that the published code computes densely.
DENSE_LAST_ROWS = 2


@dataclass(frozen=True)
class Plan:
    """How much the demo measures.

    Attributes:
        tokens: Length of every document and window.
        live_tokens: Tokens per sequence of the live distillation.
        windows: Windows of text for perplexity.
        documents: Needle documents, eight questions each.
        recall_rows: Sampled queries per layer for the recall of attention mass.
        lengths: Lengths of the time curve.
        density: Density of the comparison and of the time curve.
    """

    tokens: int = 8192
    live_tokens: int = 2048
    windows: int = 2
    documents: int = 3
    recall_rows: int = 16
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    density: float = 0.1

    def within(self, limit: int | None) -> Self:
        """Return the plan for a model of so many positions, None for any number.

        Raises:
            ValueError: If the shortest length of the time curve is past them.
        """
        lengths = tuple(n for n in self.lengths if limit is None or n <= limit)
        if not lengths:
            raise ValueError(
                f"the model has {limit:,} positions, and the demo needs {min(self.lengths):,} or more; give "
                "another model"
            )
        most = max(lengths)
        return replace(
            self, lengths=lengths, tokens=min(self.tokens, most), live_tokens=min(self.live_tokens, most)
        )


#: For models that are many times the teacher's size: a pass of theirs takes as much longer. In 4,096 tokens a
#: tenth of the blocks leaves hardly one to choose in a row.
LARGER = Plan(tokens=4096, live_tokens=1024, windows=1, documents=2, lengths=(2048, 4096), density=0.2)


@dataclass
class Method:
    """One row of the comparison.

    Attributes:
        name: What the row is called.
        scorer: Ranks the blocks; None for dense attention.
        density: Fraction of blocks asked for.
    """

    name: str
    scorer: Gates | Scorer | None
    density: float = 1.0

    @property
    def policy(self) -> TopK:
        """The policy that every sparse method uses: top-k, with the first block always read."""
        return TopK(self.density, sink_blocks=1)

    @property
    def dense_last_tokens(self) -> int:
        """Tokens of the last rows that the published code computes densely; 0 where all rows are dense."""
        scorer = self.scorer
        if scorer is None:
            return 0
        block = scorer.config.block_size if isinstance(scorer, Gates) else scorer.block_size[0]
        return DENSE_LAST_ROWS * block


def methods(gates: Gates, live: Gates | None, density: float = 0.1) -> list[Method]:
    """Return the demo's rows: dense first, then the gates around a density, then what else there is at it."""
    rows = [Method("dense", None)]
    rows += [Method("SeerAttention", gates, d) for d in (2 * density, density, density / 2)]
    if live is not None:
        rows.append(Method("SeerAttention, live gates", live, density))
    others = {
        "oracle": "oracle (true map)",
        "streaming": "sink + local",
        "meanpool": "mean-pool",
        "random": "random",
    }
    block = (gates.config.block_size,) * 2
    return rows + [
        Method(title, baselines.create(name, block_size=block), density) for name, title in others.items()
    ]


@dataclass(frozen=True)
class LiveBatches:
    """What the gates are distilled on while one watches: windows of the text, half of them with needles.

    Attributes:
        task: Makes the needle documents; None for plain windows alone.
        windows: Makes the plain ones.
    """

    task: NeedleTask | None
    windows: TextWindows

    def __call__(self, step: int) -> np.ndarray:
        """Return the sequence of a step, int64 ``[1, length]``."""
        if step % 2 or self.task is None:
            return self.windows(step)
        # Seeds far from those of the evaluation's documents.
        return self.task.make(self.windows.length, 10**6 + step, questions="spread").tokens[None]


def needles(
    tokenizer: PreTrainedTokenizerBase, text: np.ndarray, plan: Plan, wording: Wording
) -> list[NeedleDocument]:
    """Return a plan's needle documents in a wording."""
    task = NeedleTask(tokenizer, text, wording=wording)
    return [task.make(plan.tokens, seed) for seed in range(plan.documents)]


@dataclass
class Demo:
    """A model, a text, and what is measured on them.

    Attributes:
        model: The teacher, or another base model.
        tokenizer: Its tokenizer.
        text: Tokens for evaluation.
        plan: How much to measure.
        wording: What needles say; None for no needles.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    text: np.ndarray
    plan: Plan
    wording: Wording | None = TEACHERS

    def __post_init__(self) -> None:
        need = max(self.plan.tokens * self.plan.windows, *self.plan.lengths)
        if len(self.text) < need:
            raise ValueError(f"the demo needs {need} tokens of text, got {len(self.text)}")
        self.documents = (
            [] if self.wording is None else needles(self.tokenizer, self.text, self.plan, self.wording)
        )

    @property
    def questions(self) -> int:
        """Questions asked of every method."""
        return sum(len(d.answers) for d in self.documents)

    def measure(self, method: Method, dense_seconds: float | None) -> dict[str, Any]:
        """Measure one method and return its row of ``report.json``.

        Args:
            method: What to measure.
            dense_seconds: Prefill time of dense attention in the same run; None when measuring it.
        """
        tokens = self.plan.tokens
        windows = [self.text[i * tokens : (i + 1) * tokens] for i in range(self.plan.windows)]
        found = {}
        row = measured(self.model, method.scorer, method.policy, method=method.name, windows=windows)
        assert row.prefill_s is not None
        # Looking at true maps takes time, so it is not done where prefill is timed.
        with attached(self.model, method.scorer, method.policy, recall_rows=self.plan.recall_rows) as watch:
            if self.documents:
                found = self._needles(method)
            else:
                hidden_states(self.model, windows[0])
        return {
            "method": row.method,
            "density": row.density,
            "tokens": row.tokens,
            "perplexity": row.perplexity,
            **found,
            "recall": watch.recall,
            "prefill_s": row.prefill_s,
            "speedup": 1.0 if dense_seconds is None else dense_seconds / row.prefill_s,
        }

    def _needles(self, method: Method) -> dict[str, float]:
        """Return the share of answers found without and with dense last rows.

        The second differs in the last rows only, so the KV cache of the first pass is cut back by
        them and only they are computed again.
        """
        found = found_dense_last = 0
        for document in self.documents:
            cache = DynamicCache(config=self.model.config)
            cached = {**cache_argument(self.model, cache), "use_cache": True}
            hidden = hidden_states(self.model, document.tokens, **cached)
            found += document.correct(predictions(self.model, document, hidden))
            if not (rows := method.dense_last_tokens):
                continue
            cache.crop(-rows)
            set_policy(self.model, replace(method.policy, dense_last_rows=DENSE_LAST_ROWS))
            last = hidden_states(self.model, document.tokens[-rows:], **cached)
            set_policy(self.model, method.policy)
            hidden = torch.cat([hidden[:-rows], last])
            found_dense_last += document.correct(predictions(self.model, document, hidden))
        if method.scorer is None:
            found_dense_last = found
        return {"needle": found / self.questions, "needle_dense_last": found_dense_last / self.questions}

    @torch.inference_mode()
    def time(self, gates: Gates, length: int) -> dict[str, Any]:
        """Time dense against gates at the plan's density: the model's prefill and one layer, in seconds."""
        tokens = self.text[:length]
        policy = TopK(self.plan.density, sink_blocks=1)
        layers = [layer for layer, _ in gates.items()]
        middle = layers[len(layers) // 2]
        kept: list[AttentionCall] = []
        watch = Watch()

        def observe(layer: int, call: AttentionCall, selection: BlockSelection) -> None:
            watch(layer, call, selection)
            if layer == middle:
                kept.append(call)

        def prefill() -> None:
            logits_of(self.model, hidden_states(self.model, tokens)[-1:])

        def sparse_prefill() -> None:
            attach(self.model, gates, policy, min_tokens=0, observe=observe, check_base=False)
            try:
                prefill()
            finally:
                detach(self.model)

        # Short runs are repeated and warmed up; long ones are as steady without.
        repeats, warmup = (3, 1) if length <= 4096 else (1, 0)
        models = {"dense": prefill, "sparse": sparse_prefill}
        model_s = _medians(interleaved(models, repeats=repeats, warmup=warmup))
        call, gate = kept[-1], dict(gates.items())[middle]

        def dense_attention() -> Tensor:
            return F.scaled_dot_product_attention(call.q, call.k, call.v, is_causal=True, enable_gqa=True)

        _, parts = sparse_parts((call.q, call.k, call.v), (call.q_nope, call.k_nope), gate, policy)
        parts = {"dense": dense_attention, "sparse": parts["attention"], "select": parts["selection"]}
        layer_s = _medians(interleaved(parts, repeats=repeats, warmup=warmup))
        return {
            "tokens": length,
            "density": watch.density,
            "dense_prefill_s": model_s["dense"],
            "sparse_prefill_s": model_s["sparse"],
            "prefill_speedup": model_s["dense"] / model_s["sparse"],
            "dense_attention_s": layer_s["dense"],
            "sparse_attention_s": layer_s["sparse"],
            "selection_s": layer_s["select"],
            "attention_speedup": layer_s["dense"] / layer_s["sparse"],
        }


def _medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: median(values) for name, values in seconds.items()}
