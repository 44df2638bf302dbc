"""One attention layer of a prompt that is spread over processes: prefill, and decoding over the shards."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from seerattention.engine.call import AttentionCall, Given, Step, Unrotate
from seerattention.engine.layer import SparseLayer
from seerattention.engine.padding import on_device
from seerattention.engine.steps import Steps
from seerattention.engine.when import DECODING
from seerattention.ops.block_sparse_decode import block_sparse_decode
from seerattention.parallel.context import Chunk, Context, Exchange, merged
from seerattention.rows import Rows, num_blocks
from seerattention.scorer import Scorer
from seerattention.selection import BlockSelection

#: Why a step of decoding is dense.
NOT_SUMMARISED = "dense: decoding step, these gates did not summarise all that comes before it"

#: Tokens per block in which a shard is read densely.
DENSE_BLOCK = 64


@dataclass(eq=False)
class ContextLayer:
    """What a process keeps of one layer beside its keys and values: summaries of the keys of all processes.

    Attributes:
        context: How the prompts are spread.
        made: Summaries by scorer, ``[B, H, N, E]``, of all tokens so far.
        tails: Keys of the prompts' unfinished blocks, as a scorer for decoding reads them, each at its place,
            ``[B, Hk, b, D]``.
        steps: Buffers for decoding, and of which scorer.
    """

    context: Context
    made: dict[Scorer, Tensor] = field(default_factory=dict)
    tails: dict[Scorer, Tensor] = field(default_factory=dict)
    steps: Steps | None = None

    def prefill(self, handler: SparseLayer, call: AttentionCall, stream: Any = None) -> Tensor:
        """Return the output of this process's queries of a piece; every process must call it.

        Args:
            handler: Chooses and attends.
            call: The new tokens' queries and keys, and all keys and values that this process has.
            stream: See `Exchange`.

        Returns:
            ``[B, Hq, n, D]``, zeros where there is no prompt any more.
        """
        given, context = call.given, self.context
        for scorer, decodes in self._scorers(handler, call.layer).items():
            new = given.k[:, :, -given.q.shape[2] :] if scorer.after_rope else given.k_nope
            self.summarise(scorer, new, tail=decodes)
        keys, out = Exchange(context, given.k, given.v, stream), torch.zeros_like(given.q)
        for chunk in context.latest:
            for rows, length in context.alike():
                if (tokens := min(length - chunk.first, chunk.tokens)) > 0:
                    here = slice(chunk.place, chunk.place + tokens)
                    seen = slice(0, chunk.first + tokens)
                    part = replace(
                        call,
                        # Views: keys and values may still be on their way.
                        given=Given(
                            given.q[rows, :, here],
                            keys.k[rows, :, seen],
                            keys.v[rows, :, seen],
                            given.q_nope[rows, :, here],
                            given.k_nope[rows, :, here],
                        ),
                        rows=Rows.at(chunk.first, tokens),
                        summaries=_OfRows(self, rows),
                        prompt_tokens=length,
                        ready=keys.wait,
                        chosen={},
                    )
                    out[rows, :, here] = handler(part)
        keys.wait()
        return out

    def _scorers(self, handler: SparseLayer, layer: int) -> dict[Scorer, bool]:
        """Return the scorers whose summaries a layer needs, and which for decoding."""
        found: dict[Scorer, bool] = {}
        prefill, decode = (phase.scorers.get(layer) for phase in (handler.prefill, handler.decode))
        if prefill is not None and handler.prefill.policy is not None and not prefill.after_rope:
            found[prefill] = False
        if decode is not None and handler.decode.policy is not None:
            found[decode] = True
        return found

    @torch.no_grad()
    def summarise(self, scorer: Scorer, new: Tensor, *, tail: bool) -> None:
        """Summarise this process's keys of a piece, and gather what all processes made."""
        context, per = self.context, scorer.tokens_per_summary
        own = torch.cat([self._of_chunk(scorer, new, chunk) for chunk in context.latest], 2)
        entries = own.shape[2] * context.size
        whole = own.new_empty(*own.shape[:2], entries, own.shape[3])
        context.in_order(own, whole, per)
        if (before := self.made.get(scorer)) is not None:
            whole = torch.cat((before, whole), 2)
        self.made[scorer] = whole
        if tail:
            rest = new.new_zeros(*new.shape[:2], scorer.block_size[1], new.shape[3])
            for chunk in context.latest:
                for row, here in context.ends(chunk, scorer.block_size[1]):
                    rest[row, :, : here.stop - here.start] = new[row, :, here]
            context.summed(rest)
            self.tails[scorer] = rest + self.tails[scorer] if scorer in self.tails else rest

    def _of_chunk(self, scorer: Scorer, new: Tensor, chunk: Chunk) -> Tensor:
        """Summarise a chunk; a prompt's last block by the tokens that it has."""
        positions = torch.arange(chunk.first, chunk.first + chunk.tokens, device=new.device)
        made, per = scorer.compress(new[:, :, chunk.here], positions=positions), scorer.tokens_per_summary
        for row, here in self.context.ends(chunk, scorer.block_size[1]):
            begin = here.start - chunk.place
            last = positions[begin : begin + here.stop - here.start]
            short = scorer.compress(new[row : row + 1, :, here], positions=last)
            made[row, :, begin // per : begin // per + short.shape[2]] = short[0]
        return made

    def decode(self, handler: SparseLayer, step: Step) -> Tensor:
        """Return the output of a step of decoding, of ``step.given.q``'s shape; every process must call it.

        Each reads what it has of the prompts, and all of them the tokens that follow, since they have them.
        """
        selection = None
        if handler.steps(step.layer, step.given.q.shape[2]):
            selection = handler.choose_step(step).selection
        else:
            handler.count(DECODING)
        held = self.context.own_tokens
        own_out, own_lse = self._own(step, selection, held)
        both = self.context.gathered(torch.cat((own_out, own_lse[..., None]), 3))
        outs, lses = [both[..., :-1]], [both[..., -1]]
        for out, lse in (self._following(step, selection, held), _of_sinks(step, own_out)):
            outs.append(out[None])
            lses.append(lse[None])
        return merged(torch.cat(outs), torch.cat(lses)).to(step.given.q.dtype)

    def _own(self, step: Step, selection: BlockSelection | None, held: int) -> tuple[Tensor, Tensor]:
        """Attend to what this process has of the prompts; fp32, with the softmax's denominators."""
        q, k, v = step.given.q, step.given.k[:, :, :held], step.given.v[:, :, :held]
        context, device = self.context, q.device
        lengths = context.kept(
            ("own lengths", device), lambda: on_device(context.own_lengths(), device).int()
        )
        if selection is None:
            chosen = [context.kept(("everything", device), lambda: _everything(held, device))] * q.shape[2]
        else:
            size = selection.block_size[1]
            blocks = context.kept(
                ("own blocks", size, device), lambda: on_device(context.own_blocks(size), device)
            )
            own = selection.to_mask().index_select(3, blocks).split(1, 2)
            chosen = [BlockSelection.from_mask(mask, (1, size), check=False) for mask in own]
        outs = []
        for token, part in enumerate(chosen):
            outs.append(
                block_sparse_decode(
                    q[:, :, token : token + 1],
                    k,
                    v,
                    part,
                    lengths=lengths,
                    scale=step.scale,
                    softcap=step.softcap,
                    return_lse=True,
                )
            )
        out = torch.cat([out for out, _ in outs], 2).float()
        return out, torch.cat([lse for _, lse in outs], 2).float()

    def _following(self, step: Step, selection: BlockSelection | None, held: int) -> tuple[Tensor, Tensor]:
        """Attend to the tokens that follow the prompts, which every process has."""
        q, k, v = step.given.q, step.given.k[:, :, held:], step.given.v[:, :, held:]
        new, following = q.shape[2], k.shape[2]
        column = torch.arange(following, device=q.device)
        seen = column <= column[-new:, None]
        seen = seen.expand(len(q), 1, -1, -1)
        if selection is not None:
            lengths = self.context.kept(
                ("lengths", q.device), lambda: on_device(self.context.lengths, q.device)
            )
            position = lengths[:, None] + column
            blocks = (position // selection.block_size[1])[:, None, None].expand(
                -1, selection.shape[1], new, -1
            )
            seen = seen & selection.to_mask().gather(3, blocks)
        groups = q.shape[1] // k.shape[1]
        scores = (q.unflatten(1, (k.shape[1], groups)).float() @ k.float().mT.unsqueeze(2)) * step.scale
        if step.softcap is not None:
            scores = step.softcap * torch.tanh(scores / step.softcap)
        # Of selections by KV head, and of one for all.
        seen = seen.unsqueeze(2) if seen.shape[1] in (1, k.shape[1]) else seen.unflatten(1, (-1, groups))
        scores = scores.masked_fill(~seen, -torch.inf)
        # A token always sees itself.
        out = scores.softmax(-1) @ v.float().unsqueeze(2)
        return out.flatten(1, 2), scores.logsumexp(-1).flatten(1, 2)

    # What `Summaries` is to steps of decoding.

    def step(self, step: Step, scorer: Scorer, unrotate: Unrotate | None) -> str | None:
        """Summarise a step's keys too; return why there are no summaries, if so."""
        known, columns = step.lengths.known, step.columns
        assert known is not None
        assert columns is not None
        past = [n - step.given.q.shape[2] for n in known]
        if self.steps is None or self.steps.scorer is not scorer:
            if scorer not in self.tails or past != self.context.lengths:
                return NOT_SUMMARISED
            self.steps = self._begun(scorer, columns)
        if self.steps.tokens != past:
            return NOT_SUMMARISED
        if columns > self.steps.room:
            self.steps = self.steps.grown(columns)
        self.steps = self.steps.added(step)
        return None

    def _begun(self, scorer: Scorer, tokens: int) -> Steps:
        """Return buffers that hold what a scorer made of the prompts, with room for so many tokens."""
        # What is made in inference mode cannot be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            tail = self.tails[scorer].clone()
        begun = Steps(scorer, self.made[scorer], tail, list(self.context.lengths), [0] * len(tail))
        return begun.grown(tokens)

    def buffer(self) -> Tensor:
        """Return the summaries of finished blocks after `step`."""
        assert self.steps is not None
        return self.steps.summaries

    def beside(self) -> ContextLayer:
        """Return what is kept for decoding with gates of its own: this, which tells gates apart."""
        return self

    def shrunk(self, past: list[int]) -> None:
        """Take note of nothing: caches that are spread are not cropped."""


@dataclass(frozen=True)
class _OfRows:
    """The summaries that a layer has of some rows of the batch, for `SparseLayer`, made ahead."""

    layer: ContextLayer
    rows: slice
    read_for: list[Scorer] = field(default_factory=list)

    def follow(
        self, call: AttentionCall, scorer: Scorer, unrotate: Unrotate | None, *, compare: bool = True
    ) -> tuple[str | None, ...]:
        self.read_for[:] = [scorer]
        return (None,) * len(call.given.q)

    def read(self) -> Tensor:
        (scorer,) = self.read_for
        return self.layer.made[scorer][self.rows]

    def beside(self) -> _OfRows:
        return _OfRows(self.layer, self.rows)


def _everything(tokens: int, device: torch.device) -> BlockSelection:
    """Return the selection of one query that reads all of a shard."""
    mask = torch.ones(1, 1, 1, num_blocks(tokens, DENSE_BLOCK), dtype=torch.bool, device=device)
    return BlockSelection.from_mask(mask, (1, DENSE_BLOCK), check=False)


def _of_sinks(step: Step, out: Tensor) -> tuple[Tensor, Tensor]:
    """Return sinks as a part of the keys, of values that are zero."""
    zeros = torch.zeros_like(out)
    sinks = zeros.new_full((out.shape[1],), -torch.inf) if step.sinks is None else step.sinks.float()
    return zeros, sinks[:, None].expand(out.shape[:3])
