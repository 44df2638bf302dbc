"""Texts of any length as tokens: long ones in pieces: a tokenizer takes a hundred times their memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

import numpy as np

#: Characters of a piece.
PIECE = 1 << 18

#: Characters on both sides of a seam that must be tokenised as without it, and places tried for one.
AROUND, PLACES = 256, 1024

#: Today, to chat templates that write the date: a run that goes on tomorrow must read the same text.
TODAY = datetime(2025, 1, 1)
_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def encoded(text: str, tokenizer: Any, done: Callable[[int], object] | None = None) -> np.ndarray:
    """Return a text's tokens, int64 ``[n]``, without special tokens.

    A long text is tokenised in pieces, with memory for one. A piece ends where a token does, whatever lies
    before and behind, so that the tokens are those of the whole. Where a text has no such place, as in a long
    run of one letter, a token is cut.

    Args:
        text: The text.
        tokenizer: The model's, or what has its ``encode``.
        done: Called with every piece's size in bytes.

    Raises:
        ValueError: If a character is half of one, as JSON can hold it.
    """

    def encode(start: int, end: int) -> np.ndarray:
        # Not verbose: what is longer than the model reads is cut into sequences later.
        ids = tokenizer.encode(text[start:end], add_special_tokens=False, verbose=False)
        return np.array(ids, np.int64)

    def ends_token(place: int) -> bool:
        before, after = max(0, place - AROUND), place + AROUND
        alone = encode(before, place)
        return np.array_equal(encode(before, after)[: len(alone)], alone)

    parts, start, context = [], 0, 0
    while start < len(text) or not parts:
        end, known = start + PIECE, 0
        if end < len(text):
            places = range(end, min(end + PLACES, len(text)))
            end, known = next(((place, AROUND) for place in places if ends_token(place)), (end, 0))
        size = len(text[start:end].encode())
        before = encode(start - context, start) if context else ()
        parts.append(encode(start - context, end)[len(before) :])
        start, context = end, known
        if done is not None:
            done(size)
    return np.concatenate(parts)


def bos_of(tokenizer: Any) -> np.ndarray:
    """Return the token that a tokenizer begins texts with, int64 ``[1]``, or ``[0]`` if it has none."""
    bos = tokenizer.bos_token_id
    adds = bos is not None and tokenizer.encode("a")[:1] == [bos]
    return np.array([bos] if adds else [], dtype=np.int64)


def chat_text(messages: list[Any], tokenizer: Any) -> str:
    """Return messages as the tokenizer's chat template writes them, on any day the same.

    Raises:
        ValueError: If the template refuses them.
    """
    from seerattention.hosts.transformers.load import outside

    with outside("the tokenizer's chat template refuses these messages"):
        template = _DATE.sub(lambda found: repr(TODAY.strftime(found[2])), tokenizer.get_chat_template())
        return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
