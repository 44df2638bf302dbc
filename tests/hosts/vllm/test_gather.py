"""Keys and values out of pages, however these lie in memory."""

import pytest
import torch

from seerattention.hosts.vllm.gather import gathered

PAGES, HEADS, SIZE, DIM = 9, 3, 16, 24
#: How FlashAttention's and Triton's caches lie: what the order of dimensions in memory is.
LAYOUTS = {"NHD": (0, 2, 1, 3), "HND": (0, 1, 2, 3)}


def cache_of(order, dtype=torch.bfloat16):
    """Pages ``[pages, heads, tokens, 2 * dim]`` that lie in an order of their own, as vLLM makes them."""
    shape = (PAGES, HEADS, SIZE, 2 * DIM)
    places = torch.randn([shape[i] for i in order]).to(dtype)
    return places.permute([order.index(i) for i in range(4)])


@pytest.mark.parametrize("order", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 40, 64])
def test_tokens_in_order(order, dtype, tokens):
    cache, pages = cache_of(order, dtype), torch.tensor([7, 2, 5, 0], dtype=torch.int32)
    k, v = gathered(cache, pages, tokens)
    for got, first in ((k, 0), (v, DIM)):
        assert got.shape == (1, HEADS, tokens, DIM)
        assert got.dtype == dtype
        assert got.stride()[2:] == (DIM, 1)
        for token in range(tokens):
            page, place = int(pages[token // SIZE]), token % SIZE
            assert torch.equal(got[0, :, token], cache[page, :, place, first : first + DIM])


def test_pages_of_others_are_not_read():
    cache, pages = cache_of(LAYOUTS["NHD"]), torch.tensor([4, 1])
    cache[[0, 2, 3, 5, 6, 7, 8]] = float("nan")
    k, v = gathered(cache, pages, 2 * SIZE)
    assert k.isfinite().all()
    assert v.isfinite().all()
    # A table goes on behind a request's pages.
    for whole, part in zip((k, v), gathered(cache, torch.tensor([4, 1, 8, 8]), 2 * SIZE), strict=True):
        assert torch.equal(whole, part)
