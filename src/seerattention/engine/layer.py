"""What `attach` puts in place of a layer's attention: decide when, select, attend."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from seerattention.crossover import Crossover, crossover
from seerattention.engine.call import AttentionCall, Choices, Part, Step, StepSummaries, Unrotate
from seerattention.engine.kept import summarised
from seerattention.engine.summaries import Growing
from seerattention.engine.when import DECODING, PREFILL, why_dense, why_dense_prompt, why_dense_step
from seerattention.ops.block_sparse_attention import BACKENDS, block_sparse_attention
from seerattention.ops.block_sparse_decode import block_sparse_decode
from seerattention.ops.dispatch import check_backend
from seerattention.ops.select_blocks import select_blocks
from seerattention.ops.select_decode_blocks import select_decode_blocks
from seerattention.policies import Policy
from seerattention.rows import Rows, num_blocks
from seerattention.scorer import Scorer
from seerattention.selection import BlockSelection

#: How `SparseLayer.usage` counts a sparse step of decoding.
SPARSE_STEP = "sparse: decoding step"

#: Called after every sparse layer with its inputs and the blocks that were read; one call at a time.
Observer = Callable[[int, AttentionCall, BlockSelection], None]

# Requests of several threads count, and are observed, one after the other.
_ONE_AT_A_TIME = threading.RLock()


def _crossovers() -> dict[str, Crossover]:
    # Looked up here, not in a call, where `torch.compile` would trace the reading of a file.
    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return {kind: crossover(kind) for kind in kinds}


@dataclass(frozen=True)
class Phase:
    """What chooses blocks in prefill, or in decoding.

    Attributes:
        scorers: The scorer of every layer.
        policy: How many blocks to read; None reads all, densely.
        reach: Up to which position the scorers were taught, None where that is not known.
        shared: Of layers without a scorer of their own, the earlier one whose choice they read.
    """

    scorers: Mapping[int, Scorer]
    policy: Policy | None
    reach: int | None = None
    shared: Mapping[int, int] = field(default_factory=dict)

    def scorer(self, layer: int) -> Scorer:
        """Return the scorer that chooses for a layer."""
        return self.scorers[self.shared.get(layer, layer)]

    def chosen(self, layer: int, choices: Choices) -> list[Part]:
        """Return what was chosen, earlier in a pass, for a layer without a scorer.

        Raises:
            RuntimeError: If the layer that chooses has not been called in this pass.
        """
        first = self.shared[layer]
        if first not in choices:
            raise RuntimeError(
                f"layer {layer} reads what layer {first} chose, which was not called before it in this pass; "
                "call the model or its decoder, or distil gates with layers_per_gate 1"
            )
        return choices[first]

    def keep(self, layer: int, choices: Choices, parts: list[Part]) -> None:
        """Keep what was chosen for a layer if later ones read it."""
        if layer in self.shared.values():
            choices[layer] = parts


@dataclass(frozen=True)
class SparseLayer:
    """Computes attention layers over the blocks that scorers and policies choose.

    Attributes:
        prefill: Chooses for prompts, and
        decode: for steps of decoding, by the same scorers or by others.
        unrotate: Rotates the model's cached keys back.
        backend: A backend of ``block_sparse_attention``.
        min_tokens: Sequences shorter than this are dense, all others sparse; by default the table of
            measured crossovers says which, by length and, where the policy knows it, by density.
        observe: Called after every sparse layer.
        usage: How often a layer was sparse, or dense and why.
        short: Of every policy that could not read what it asks for, why, in the latest such prompt.
        passed: Of scorers, how far they were taught, where a text went past it and was warned of.
        crossovers: The table's entry for every kind of device at hand.
    """

    prefill: Phase
    decode: Phase
    unrotate: Unrotate
    backend: str = "auto"
    min_tokens: int | None = None
    observe: Observer | None = None
    usage: Counter[str] = field(default_factory=Counter)
    short: dict[str, str] = field(default_factory=dict)
    passed: set[int] = field(default_factory=set)
    crossovers: Mapping[str, Crossover] = field(default_factory=_crossovers)

    def __post_init__(self) -> None:
        check_backend(BACKENDS, self.backend)
        if not (self.min_tokens is None or (isinstance(self.min_tokens, int) and self.min_tokens >= 0)):
            raise ValueError(f"min_tokens must be a whole number >= 0, got {self.min_tokens!r}")

    def __call__(self, call: AttentionCall) -> Tensor:
        """Return the output of one layer, of ``call.q``'s shape."""
        scorer, read = self.prefill.scorers.get(call.layer), None
        if scorer is None:
            parts = self.prefill.chosen(call.layer, call.chosen)
            self._summarise(call, None, [part.why for part in parts])
        else:
            known = self._crossover(call.given.q)
            why = why_dense(call, scorer, self.prefill.policy, self.min_tokens, known)
            why, read = self._summarise(call, scorer, why)
            rows: dict[str | None, list[int]] = {}
            for row, (new, _) in enumerate(call.lengths):
                if new:
                    rows.setdefault(why[row], []).append(row)
            parts = [Part(some if len(rows) > 1 else None, reason) for reason, some in rows.items()]
        outs, done = {}, []
        for part in parts:
            some = call if part.rows is None else call.part(part.rows)
            out, part = self._compute(some, scorer, part, read)
            done.append(part)
            if part.rows is None:
                break
            outs |= zip(part.rows, out.split([new for new, _ in some.lengths], 2), strict=True)
        self.prefill.keep(call.layer, call.chosen, done)
        return torch.cat([outs[row] for row in sorted(outs)], 2) if outs else out

    def _summarise(
        self, call: AttentionCall, scorer: Scorer | None, why: Sequence[str | None]
    ) -> tuple[Sequence[str | None], Callable[[], Tensor] | None]:
        """Summarise a call's keys for the layer's scorers, if it has any.

        Returns:
            Why rows of the batch are dense, and what returns the summaries for prefill, None without any.
        """
        policy, decodes = self.prefill.policy, self.decode.policy is not None
        decoder = self.decode.scorers.get(call.layer) if decodes else None
        summaries, read, missing = call.summaries or Growing(), None, ()
        compare = any(reason != DECODING for reason in why)
        if scorer is not None:
            reads = policy is not None and not scorer.after_rope
            if reads or decoder is scorer:
                missing = summaries.follow(call, scorer, self._unrotate(scorer), compare=compare)
                if reads:
                    why = tuple(a or b for a, b in zip(why, missing, strict=True))
                    read = summaries.read
        if decoder is not None and decoder is not scorer:
            summaries = summaries.beside()
            missing = summaries.follow(call, decoder, self._unrotate(decoder), compare=compare)
        if decoder is not None and call.cached.room is not None and compare and not any(missing):
            summaries.fill(call)
            # The steps to come know how long their sequences are on the device alone.
            self._check_reach(self.decode, [total for _, total in call.lengths])
        return why, read

    @property
    def row_tokens(self) -> int:
        """Query tokens that choose together in prefill; the most of any layer."""
        return max(scorer.block_size[0] for scorer in self.prefill.scorers.values())

    def why_dense(self, tokens: int, device: torch.device) -> str | None:
        """Return why a prompt of so many tokens is dense in every layer, or None."""
        scorer, policy = next(iter(self.prefill.scorers.values())), self.prefill.policy
        if policy is None:
            return PREFILL
        known = self.crossovers.get(device.type)
        return why_dense_prompt(tokens, policy, scorer.block_size[1], self.min_tokens, known)

    def steps(self, layer: int, new: int) -> bool:
        """Whether so many new tokens after earlier ones are a step of decoding, which `step` computes."""
        return self.decode.policy is not None and new < self.decode.scorer(layer).block_size[1]

    def choose_step(self, step: Step) -> Part:
        """Choose what a step of decoding reads, or say why that is everything."""
        scorer, given, known = self.decode.scorers.get(step.layer), step.given, step.lengths.known
        before = self.prefill.scorers.get(step.layer)
        if before is not None and before is not scorer and known is not None:
            # Steps are not summarised for prefill, but a crop before them is to be known there.
            step.summaries.shrunk([n - given.q.shape[2] for n in known])
        if scorer is None:
            (part,) = self.decode.chosen(step.layer, step.chosen)
        else:
            part = self._choose(step, scorer, step.summaries if before is scorer else step.summaries.beside())
        self.decode.keep(step.layer, step.chosen, [part])
        self.count(part.why or SPARSE_STEP)
        return part

    def step(self, step: Step) -> Tensor:
        """Return the output of a step of decoding, of ``step.given.q``'s shape."""
        part, given = self.choose_step(step), step.given
        if part.selection is None:
            call = step.call()
            return call.unpacked(call.dense())
        selection = part.selection.to(given.q.device)
        out = block_sparse_decode(
            given.q,
            given.k,
            given.v,
            selection,
            lengths=step.lengths.keys,
            starts=step.lengths.starts,
            scale=step.scale,
            softcap=step.softcap,
            sinks=step.sinks,
        )
        assert isinstance(out, Tensor)
        if self.observe is not None and not step.captured:
            call = step.call()
            with _ONE_AT_A_TIME:
                self.observe(step.layer, call, selection if call.padding is None else _packed(selection))
        return out

    def _choose(self, step: Step, scorer: Scorer, summaries: StepSummaries) -> Part:
        """Choose for a step of decoding."""
        given, known, policy = step.given, step.lengths.known, self.decode.policy
        assert policy is not None, "nothing chooses for decoding"
        why = None
        if known is not None:
            block = scorer.block_size[1]
            why = why_dense_step(max(known), policy, block, self.min_tokens, self._crossover(given.q))
        if why := (summaries.step(step, scorer, self._unrotate(scorer)) or why):
            return Part(None, why)
        self._check_reach(self.decode, known or ())
        selection = select_decode_blocks(
            given.q if scorer.after_rope else given.q_nope,
            summaries.buffer(),
            scorer.per_token(),
            policy,
            lengths=step.lengths.keys,
            num_keys=step.columns or given.k.shape[2],
            kv_heads=given.k.shape[1],
        )
        return Part(None, None, selection)

    def _unrotate(self, scorer: Scorer) -> Unrotate | None:
        return None if scorer.after_rope else self.unrotate

    def _crossover(self, q: Tensor) -> Crossover | None:
        return self.crossovers.get(q.device.type)

    def count(self, how: str) -> None:
        """Count a layer that ran sparse, or dense and why."""
        with _ONE_AT_A_TIME:
            self.usage[how] += 1

    def _compute(
        self, call: AttentionCall, scorer: Scorer | None, part: Part, read: Callable[[], Tensor] | None
    ) -> tuple[Tensor, Part]:
        """Compute rows densely if there is a reason, else over blocks that are chosen now or were before."""
        self.count(part.why or "sparse")
        if part.why is not None:
            call.ready()
            return call.dense(), part
        selection = part.selection
        if scorer is not None:
            if read is None:
                summaries = _compressed(call, scorer)
            else:
                summaries = read() if part.rows is None else read()[part.rows]
            selection = self.choose(call, scorer, summaries)
        assert selection is not None
        selection = selection.to(call.q.device)
        out = self.attend(call, selection)
        if self.observe is not None:
            with _ONE_AT_A_TIME:
                self.observe(call.layer, call, selection)
        return out, part._replace(selection=selection)

    def choose(self, call: AttentionCall, scorer: Scorer, summaries: Tensor) -> BlockSelection:
        """Choose the blocks that a call's queries read, by a scorer and its summaries of all keys."""
        policy = self.prefill.policy
        assert policy is not None
        self._note_short(call, policy, scorer.block_size[1])
        self._check_reach(self.prefill, [call.prompt_tokens or total for _, total in call.lengths])
        return select_blocks(
            call.q if scorer.after_rope else call.q_nope,
            summaries,
            scorer,
            _policy_of(call, policy, scorer),
            rows=call.rows,
            positions=call.positions,
        )

    def attend(self, call: AttentionCall, selection: BlockSelection) -> Tensor:
        """Return what a call's queries read in the blocks chosen, of ``call.q``'s shape."""
        call.ready()
        return block_sparse_attention(
            call.q,
            call.k,
            call.v,
            selection,
            rows=call.rows,
            scale=call.scale,
            softcap=call.softcap,
            sinks=call.sinks,
            backend=self.backend,
        )

    def _check_reach(self, phase: Phase, lengths: Iterable[int]) -> None:
        """Warn, once, of texts that are longer than what the scorers of a phase were taught for."""
        reach = phase.reach
        if reach is None or (tokens := max(lengths, default=0)) <= reach:
            return
        with _ONE_AT_A_TIME:
            if reach in self.passed:
                return
            self.passed.add(reach)
        warnings.warn(
            f"a text of {tokens:,} tokens is past the {reach:,} positions that these gates were taught for, "
            "where they may choose worse than gates that were not taught at all: distil gates with a reach "
            f"of {tokens:,} or more, or read such texts densely",
            stacklevel=2,
        )

    def _note_short(self, call: AttentionCall, policy: Policy, block: int) -> None:
        """Remember that a prompt is too short for the density asked for, see `Policy.short_of`."""
        for new, total in set(call.lengths):
            tokens = call.prompt_tokens or (total if new == total else 0)
            if tokens and (why := policy.short_of(num_blocks(tokens, block), block)):
                self.short[str(policy)] = why


def _policy_of(call: AttentionCall, policy: Policy, scorer: Scorer) -> Policy:
    """Return a layer's policy, for a piece of a prompt of known length as it is for the whole prompt."""
    policy, block, tokens = policy.at(call.layer), scorer.block_size, call.prompt_tokens
    if tokens is None:
        return policy
    after = num_blocks(tokens, block[0]) - num_blocks(call.rows.num_keys, block[0])
    return policy.for_prompt(num_blocks(tokens, block[1]), block[1], rows_after=after)


def _packed(selection: BlockSelection) -> BlockSelection:
    """Return the selection of a step with the sequences behind one another."""
    batch, heads, tokens, columns = selection.shape
    bits = selection.bits.transpose(0, 1).flatten(1, 2)[None]
    return BlockSelection(bits, (1, heads, batch * tokens, columns), selection.block_size)


def _compressed(call: AttentionCall, scorer: Scorer) -> Tensor:
    """Summarise all keys after RoPE."""
    call.ready()
    if not call.rows.is_packed:
        return scorer.compress(call.k, positions=torch.arange(call.k.shape[2], device=call.k.device))
    rows = Rows.packed([(keys, keys) for _, keys in call.rows.known], call.k.device)
    return summarised(scorer, call.k, rows, rows.positions())
