"""Attached models decode sparsely: each token reads the blocks that its own choice takes, whatever way it comes."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer

from seerattention import baselines
from seerattention.hosts import transformers as host

BUDGET = "token_budget:48"
SHARE = "threshold:0.15"
STEP, SPARSE = "dense: decoding step", "sparse: decoding step"


def attached(tiny, kind="llama", decode=BUDGET, prefill="dense", **options):
    """A sparse model, its gates for both phases."""
    model = tiny.make(kind)
    gates = tiny.gates_for(model, phase="both")
    return host.attach(model, gates, prefill=prefill, decode=decode, min_tokens=0, **options)


def fed(tiny, model, ids, sizes, cache=None, mask=None):
    """Logits of a text given in parts, by a cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    outs, end = [], 0
    for part in ids.split(sizes, 1):
        end += part.shape[1]
        more = {}
        if mask is not None:
            positions = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)
            more = {"attention_mask": mask[:, :end], "position_ids": positions[:, -part.shape[1] :]}
        outs.append(tiny.logits(model, part, cache=cache, **more))
    return torch.cat(outs, 1)


def chosen(gate, call, row, decode):
    """Blocks that one token reads by formulas of its own, bool ``[Hk, blocks]``."""
    block, token, kv_heads = gate.block_size[1], gate.per_token(), call.k.shape[1]
    blocks, finished = row // block + 1, (row + 1) // block
    read = torch.zeros(kv_heads, blocks, dtype=torch.bool)
    read[:, -1] = True
    if finished:
        place = torch.arange(row + 1)
        keys = gate.compress(call.k_nope[:, :, : finished * block], positions=place[: finished * block])
        query = token.summarise_queries(call.q_nope[:, :, row : row + 1], positions=place[row:])[0, :, 0]
        keys = keys[0].repeat_interleave(len(query) // keys.shape[1], 0).unflatten(1, (finished, -1))
        scores = gate.scale * torch.einsum("he,hnse->hns", query.double(), keys.double()).amax(-1)
        share = scores.softmax(-1).unflatten(0, (kv_heads, -1)).amax(1)
        name, value = decode.split(":")
        if name == "threshold":
            read[:, :finished] |= share / share.sum(-1, keepdim=True) > float(value)
        else:
            others = share[:, : blocks - 1]
            best = others.argsort(dim=-1, descending=True, stable=True)[:, : int(value) // block - 1]
            read[:, : blocks - 1].scatter_(1, best, True)
    return read


@torch.no_grad()
def by_hand(tiny, kind, ids, prompt, decode, dtype=torch.float32):
    """Logits of a text at once, every token after the prompt attending to what it chooses."""
    model = tiny.make(kind)
    gates = dict(tiny.gates_for(model, phase="both").to(dtype).items())
    model = model.to(dtype)

    def handler(call):
        gate, block, group = gates[call.layer], tiny.block, call.q.shape[1] // call.k.shape[1]
        seen = torch.ones(call.q.shape[1], ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        for row in range(prompt, ids.shape[1]):
            read = chosen(gate, call, row, decode).repeat_interleave(block, 1)[:, : row + 1]
            seen[:, row, : row + 1] = read.repeat_interleave(group, 0)
        k, v = (x.repeat_interleave(group, 1) for x in (call.k, call.v))
        scores = call.scale * call.q @ k.mT
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        weights = scores.masked_fill(~seen, -torch.inf).exp()
        total = weights.sum(-1, keepdim=True)
        if call.sinks is not None:
            total = total + call.sinks.to(dtype).exp()[:, None, None]
        return weights / total @ v

    with host.intercept(model, handler):
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("decode", [BUDGET, SHARE])
def test_a_step_is_what_each_token_chooses(tiny, kind, decode):
    """Families with windows, soft-caps, sinks, part of a head rotated: at once by hand, and token by token."""
    ids = tiny.tokens(1, 110)
    results = [by_hand(tiny, kind, ids, 70, decode, dtype) for dtype in (torch.float32, torch.float64)]
    model = attached(tiny, kind, decode)
    for sizes in ((70, *(1,) * 40), (70, 5, 15, 1, 1, 10, 8)):
        tiny.assert_as_close(fed(tiny, model, ids, sizes), *results)
    layers = len(tiny.full_layers(model))
    assert host.usage(model) == {"dense: no policy for prefill": 2 * layers, SPARSE: 46 * layers}
