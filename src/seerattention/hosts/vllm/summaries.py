"""Summaries of one request's keys, made anew or in pages, and which pages hold those of other keys."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from seerattention.engine.call import AttentionCall, Unrotate
from seerattention.gate import AttnGate
from seerattention.rows import num_blocks


class Made:
    """The summaries of one request's keys in one layer, made of all keys in every piece of its prompt.

    What `engine.summaries.Growing` does for a cache that anyone may change, pages of vLLM's need nothing of:
    nothing is compared, and nothing waits for the device. Of a piece that is computed in parts, later ones
    add their own keys.
    """

    def __init__(self) -> None:
        self.made, self.tokens = torch.empty(0), 0

    def follow(
        self, call: AttentionCall, scorer: AttnGate, unrotate: Unrotate | None, *, compare: bool = True
    ) -> tuple[str | None, ...]:
        """Summarise a call's keys, earlier ones rotated back, unless nothing will read them."""
        assert unrotate is not None
        if not compare:
            return (None,)
        past, total = call.rows.first, call.rows.num_keys
        goes_on = past > 0 and past == self.tokens and past % scorer.tokens_per_summary == 0
        begin = past if goes_on else 0
        positions = torch.arange(begin, total, device=call.given.k.device)
        # Of all keys once more, since to put the new ones behind the earlier would copy both.
        keys = call.given.k_nope if begin == past else unrotate(call.layer, call.given.k, positions[None])
        made = scorer.compress(keys, positions=positions)
        self.made = torch.cat((self.made, made), 2) if goes_on else made
        self.tokens = total
        return (None,)

    def read(self) -> Tensor:
        """Return the summaries of all keys so far, ``[1, H, N, E]``."""
        return self.made


class Paged:
    """The summaries of one request's keys in one layer; `engine.call.Summaries` of a prompt's pieces.

    Args:
        pages: The layer's.
        table: int64 ``[N]``, the request's pages in order.
        stale: Which of them hold other summaries than of their keys.
        page_tokens: Tokens of a page.
    """

    def __init__(self, pages: Tensor, table: Tensor, stale: list[int], page_tokens: int) -> None:
        self.pages, self.table, self.stale, self.page_tokens = pages, table, stale, page_tokens
        self.tokens, self.size = 0, 0

    def follow(
        self, call: AttentionCall, scorer: AttnGate, unrotate: Unrotate | None, *, compare: bool = True
    ) -> tuple[str | None, ...]:
        """Write the summaries of blocks that have new tokens, and of stale pages."""
        assert unrotate is not None
        self.tokens, self.size = call.rows.num_keys, scorer.tokens_per_summary
        past, block = call.rows.first, scorer.block_size[1]
        self._write(call, scorer, unrotate, past // block * block, self.tokens)
        for page in self.stale:
            begin = page * self.page_tokens
            if begin < past:
                self._write(call, scorer, unrotate, begin, min(begin + self.page_tokens, self.tokens))
        self.stale = []
        return (None,)

    def _write(self, call: AttentionCall, scorer: AttnGate, unrotate: Unrotate, begin: int, end: int) -> None:
        positions = torch.arange(begin, end, device=call.given.k.device)
        keys = unrotate(call.layer, call.given.k[:, :, begin:end], positions[None])
        made = scorer.compress(keys, positions=positions)[0].transpose(0, 1)
        state = torch.arange(len(made), device=made.device) + begin // self.size
        per_page = self.page_tokens // self.size
        self.pages[self.table[state // per_page], :, state % per_page] = made.to(self.pages.dtype)

    def read(self) -> Tensor:
        """Return the summaries of all keys so far, ``[1, H, N, E]``."""
        states = num_blocks(self.tokens, self.size)
        pages = self.table[: num_blocks(self.tokens, self.page_tokens)]
        return self.pages[pages].transpose(0, 1).flatten(1, 2)[None, :, :states]


class Stale:
    """Which pages of a block table hold summaries of other keys than those that they hold.

    vLLM's own kernels write keys and no summaries: in decoding, whose layers may be replayed as graphs. What
    a pass writes is known before it begins, so it is noted then.

    Args:
        pages: How many there are.
        page_tokens: Tokens of a page.
        device: Of the block table.
    """

    def __init__(self, pages: int, page_tokens: int, device: torch.device) -> None:
        self.stale = torch.ones(pages, dtype=torch.bool, device=device)
        self.page_tokens = page_tokens

    def after(
        self, table: Tensor, past: np.ndarray, keys: np.ndarray, sparse: set[int]
    ) -> dict[int, list[int]]:
        """Note what a pass writes, and return which of their pages sparse rows find stale before it.

        Args:
            table: int ``[rows or more, N]``, every row's pages.
            past: int ``[rows]``, how many tokens there are before the pass, and
            keys: after it.
            sparse: Rows that bring all of their pages up to date.
        """
        found = {}
        for row in sparse:
            pages = table[row, : num_blocks(int(keys[row]), self.page_tokens)].long()
            found[row] = self.stale[pages].nonzero().flatten().tolist()
        # All rows at once, since every step of decoding comes here: a page or two of each.
        written = keys > past
        written[list(sparse)] = False
        first, end = past // self.page_tokens, -(-keys // self.page_tokens)
        self._mark(table, first, np.where(written, end, first), stale=True)
        for row in sparse:
            if keys[row] > past[row]:
                self._mark(table[row : row + 1], np.zeros(1, int), end[row : row + 1], stale=False)
        return found

    def _mark(self, table: Tensor, first: np.ndarray, end: np.ndarray, *, stale: bool) -> None:
        """Mark every row's pages from its first to before its end."""
        if not (counts := end - first).any():
            return
        rows = np.repeat(np.arange(len(counts)), counts)
        columns = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts) + first[rows]
        rows, columns = (torch.from_numpy(x).to(table.device) for x in (rows, columns))
        self.stale[table[rows, columns].long()] = stale
