"""KV eviction as a way to decode: what is dropped of a cache is never read again, here block by block.

Handlers for `seerattention.hosts.transformers.intercept`. A prompt is dense and comes in one call; every
later token reads the first and the latest blocks that the policy always reads, and of all others those still
kept. Nothing is really dropped, only not read, and attention is `block_sparse_decode`'s: beside a scorer of
the same policy nothing differs but the choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.engine.layer import Observer
from seerattention.hosts.transformers import AttentionCall
from seerattention.ops.attention_scores import attention_scores, block_mass, by_block
from seerattention.ops.block_sparse_decode import block_sparse_decode
from seerattention.ops.select_decode_blocks.reference import group_scores
from seerattention.policies import TokenBudget, check_decodes
from seerattention.rows import num_blocks
from seerattention.selection import BlockSelection


@dataclass
class _Layer:
    """What is known of a layer's cache.

    Attributes:
        mass: fp32 ``[B, Hq, N]``, what every block's attention adds up to.
        read: bool ``[B, Hk, N]``, the blocks that the latest token read; all others are gone.
        own: The block of the latest token.
    """

    mass: Tensor
    read: Tensor
    own: int = -1


class Evicting:
    """What eviction rules share: whenever a block is begun, those with the least attention go.

    Query heads of a group share their blocks: the largest share of attention among them counts, as in
    `group_scores`. One instance is for one batch of prompts of one length and what follows them; its next
    prompt begins anew.

    Args:
        policy: How many tokens are read; ``local_blocks`` are the latest ones.
        block: Tokens per block.
        observe: Called after every decoding step of a layer.

    Raises:
        ValueError: If the budget is below a block.
    """

    def __init__(self, policy: TokenBudget, *, block: int = 64, observe: Observer | None = None) -> None:
        check_decodes(policy, block)
        self.policy, self.block, self.observe = policy, block, observe
        self._layers: dict[int, _Layer] = {}

    def __call__(self, call: AttentionCall) -> Tensor:
        """Return the output of one layer, of ``call.q``'s shape."""
        if call.padding is not None:
            raise NotImplementedError("eviction is measured without padding; give prompts of one length")
        new, total = call.rows.num_queries, call.rows.num_keys
        if new == total:
            mass = self.prompt_mass(call)
            self._layers[call.layer] = _Layer(mass, mass.new_ones(1, 1, mass.shape[2], dtype=torch.bool))
            return call.dense()
        if new >= self.block or call.layer not in self._layers:
            raise ValueError(
                f"{new} tokens came after {total - new} others; give the whole prompt at once, and later "
                f"tokens fewer than {self.block} at a time"
            )
        selection = self._select(call, self._layers[call.layer])
        if self.observe is not None:
            self.observe(call.layer, call, selection)
        options = {"scale": call.scale, "softcap": call.softcap, "sinks": call.sinks}
        out = block_sparse_decode(call.q, call.k, call.v, selection, **options)
        assert isinstance(out, Tensor)
        return out

    def prompt_mass(self, call: AttentionCall) -> Tensor:
        """Return the attention that a prompt's blocks get, fp32 ``[B, Hq, N]``, summed over queries."""
        raise NotImplementedError

    def decoded_mass(self, call: AttentionCall, rows: slice, read: Tensor) -> Tensor | None:
        """Return what decoded tokens add to it, or None if nothing.

        Args:
            call: A decoding step.
            rows: Some of its tokens.
            read: bool ``[B, Hk, N]``, the blocks that they read.
        """
        return None

    def _select(self, call: AttentionCall, layer: _Layer) -> BlockSelection:
        new, total = call.rows.num_queries, call.rows.num_keys
        blocks = num_blocks(total, self.block)
        layer.mass, layer.read = (F.pad(x, (0, blocks - x.shape[2])) for x in (layer.mass, layer.read))
        number, row, masks = torch.arange(blocks, device=call.q.device), 0, []
        while row < new:
            own = (total - new + row) // self.block
            rows = slice(row, min(new, (own + 1) * self.block - (total - new)))
            if own != layer.own:
                always = self.policy.always((number == own)[None], (number <= own)[None])
                layer.own, layer.read = own, always | self._kept(layer, always, call.k.shape[1])
            if (mass := self.decoded_mass(call, rows, layer.read)) is not None:
                layer.mass = layer.mass + mass
            masks.append(layer.read.unsqueeze(2).expand(-1, -1, rows.stop - row, -1))
            row = rows.stop
        return BlockSelection.from_mask(torch.cat(masks, 2), (1, self.block), check=False)

    def _kept(self, layer: _Layer, always: Tensor, heads: int) -> Tensor:
        """Choose from the blocks read last, beside those always read, ``[1, N]``; bool ``[B, Hk, N]``."""
        batch, query_heads, blocks = layer.mass.shape
        there = layer.read.expand(batch, heads, -1).unsqueeze(2)
        of_queries = there.repeat_interleave(query_heads // heads, 1)
        scores = group_scores(layer.mass.log().unsqueeze(2), of_queries, heads)
        return self.policy.rule(blocks, self.block).choose(scores, there, always).squeeze(2)


class SnapKV(Evicting):
    """Keep what a prompt's last queries attend to: decided once, at the prompt's end.

    Of decoded tokens the latest blocks are read. The published method keeps them all, and so reads more than
    its budget the longer it decodes.

    Source: SnapKV, section 4 (arXiv 2404.14469). It pools the attention over neighbouring tokens; here a
        block adds it up.
    """

    #: Queries at a prompt's end that vote, as published.
    WINDOW = 64

    def prompt_mass(self, call: AttentionCall) -> Tensor:
        """Return the attention of the last queries; see `Evicting.prompt_mass`."""
        q, size = call.q[:, :, -self.WINDOW :], (self.WINDOW, self.block)
        return block_mass(q, call.k, size, scale=call.scale, softcap=call.softcap).squeeze(2)


class H2O(Evicting):
    """Keep the heavy hitters: the blocks that got the most attention of all queries so far.

    Attention is added up over the prompt and, as they compute it over what is left, over the decoded tokens.
    The published setting gives half of the budget to the latest tokens.

    Source: H2O, section 4 (arXiv 2306.14048), which evicts a token at a time.
    """

    def prompt_mass(self, call: AttentionCall) -> Tensor:
        """Return the attention of all queries; see `Evicting.prompt_mass`."""
        size = (self.block, self.block)
        return block_mass(call.q, call.k, size, scale=call.scale, softcap=call.softcap).sum(2)

    def decoded_mass(self, call: AttentionCall, rows: slice, read: Tensor) -> Tensor:
        """Return the attention within the blocks read; see `Evicting.decoded_mass`."""
        q, positions = call.q[:, :, rows], call.positions[rows]
        scores = attention_scores(q, call.k, positions, scale=call.scale, softcap=call.softcap)
        hidden = ~read.repeat_interleave(self.block, 2)[..., : call.k.shape[2]]
        hidden = hidden.repeat_interleave(q.shape[1] // read.shape[1], 1).unsqueeze(2)
        return by_block(scores.masked_fill_(hidden, float("-inf")).softmax(-1), self.block).sum((2, 4))
