"""Whole steps of attached models on a CUDA device: in graphs, compiled, without waiting."""

from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from seerattention.engine.kept import Kept
from seerattention.hosts.transformers import attach, cache_argument, detach, new_gates, usage
from seerattention.testing.waiting import no_waiting

pytestmark = pytest.mark.gpu

SPARSE = "sparse: decoding step"
PROMPT, ROOM = 700, 1536


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def model(request):
    """A small model that is sparse in both phases, with every ninth to twentieth block read in decoding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=16384,
    )
    model = LlamaForCausalLM(config).to("cuda", request.param).eval()
    # Random text never ends by itself.
    model.generation_config.eos_token_id = None
    gates = new_gates(model, phase="both")
    attach(model, gates, prefill="threshold:0.02", decode="token_budget:256", min_tokens=0)
    yield model
    detach(model)


def tokens(batch, length, seed=1):
    # Token 0 would count as padding.
    return torch.randint(1, 128, (batch, length), generator=torch.Generator().manual_seed(seed)).cuda()


def filled(model, ids, mask=None, room=ROOM):
    """A static cache that holds a prompt."""
    cache = StaticCache(config=model.config, max_cache_len=room)
    more = {}
    if mask is not None:
        mask = mask[:, : ids.shape[1]]
        more = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    model(ids, **cache_argument(model, cache), **more)
    return cache


class Graph:
    """One step of a model, captured once: ids and positions are written to in place, the cache grows."""

    def __init__(self, model, cache, new, mask=None):
        first = (mask == 0).sum(1)[:, None] if mask is not None else 0
        batch = cache.layers[0].keys.shape[0]
        self.ids = torch.zeros(batch, new, dtype=torch.long, device="cuda")
        self.first, self.graph = first, torch.cuda.CUDAGraph()
        self.positions = torch.zeros(batch, new, dtype=torch.long, device="cuda")
        more = {**cache_argument(model, cache), "position_ids": self.positions}
        if mask is not None:
            more["attention_mask"] = mask
        with torch.cuda.graph(self.graph):
            self.logits = model(self.ids, **more).logits

    def __call__(self, ids, position):
        self.ids.copy_(ids)
        self.positions.copy_(torch.arange(position, position + ids.shape[1], device="cuda") - self.first)
        self.graph.replay()
        return self.logits.clone()


def steps_of(ids, sizes, begin=PROMPT):
    for size in sizes:
        yield ids[:, begin : begin + size], begin
        begin += size


@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_replayed_over_growing_lengths(model, new, padded):
    """One graph over hundreds of steps is eager decoding, and prefill goes on from what it left."""
    ids, mask = tokens(3, ROOM, seed=2), None
    if padded:
        mask = torch.ones(3, ROOM, dtype=torch.long, device="cuda")
        mask[1, :100], mask[2, :571] = 0, 0
    sizes = [new] * (400 // new)
    cache, eager = (filled(model, ids[:, :PROMPT], mask) for _ in range(2))
    # Kernels are compiled, and whatever is made once is made, before anything is captured.
    warm = filled(model, ids[:, :PROMPT], mask)
    for part, begin in steps_of(ids, [new] * 3):
        more = {"attention_mask": mask} if padded else {}
        positions = torch.arange(begin, begin + new, device="cuda").expand(3, -1)
        model(part, **cache_argument(model, warm), position_ids=positions, **more)
    step = Graph(model, cache, new, mask)
    for part, begin in steps_of(ids, sizes):
        more = {"attention_mask": mask} if padded else {}
        first = 0 if mask is None else (mask == 0).sum(1)[:, None]
        positions = torch.arange(begin, begin + new, device="cuda").expand(3, -1) - first
        expected = model(part, **cache_argument(model, eager), position_ids=positions, **more).logits
        assert torch.equal(step(part, begin), expected), begin
    assert int(cache.get_seq_length()) == PROMPT + sum(sizes)
    for one, other in zip(
        cache.seerattention_summaries.values(), eager.seerattention_summaries.values(), strict=True
    ):
        assert torch.equal(one.steps.summaries, other.steps.summaries)
    outs = []
    for one in (cache, eager):
        end = PROMPT + sum(sizes)
        more = {"attention_mask": mask[:, : end + 200]} if padded else {}
        outs.append(model(ids[:, end : end + 200], **cache_argument(model, one), **more).logits)
        assert [kept.kept.tokens for kept in one.seerattention_summaries.values()] == 2 * [
            [end + 200 - gone for gone in ((0, 100, 571) if padded else (0, 0, 0))]
        ]
    assert torch.equal(*outs)


@torch.no_grad()
def test_a_graph_serves_the_next_prompt(model):
    """The cache is reset and filled with another text; its buffers stay where the graph has them."""
    ids, other = tokens(2, ROOM, seed=3), tokens(2, ROOM, seed=4)
    cache = filled(model, ids[:, :PROMPT])
    model(ids[:, PROMPT : PROMPT + 1], **cache_argument(model, cache))
    step = Graph(model, cache, 1)
    for part, begin in steps_of(ids, [1] * 100, PROMPT + 1):
        step(part, begin)
    cache.reset()
    model(other[:, :300], **cache_argument(model, cache))
    eager = filled(model, other[:, :300])
    for part, begin in steps_of(other, [1] * 200, 300):
        assert torch.equal(step(part, begin), model(part, **cache_argument(model, eager)).logits), begin


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_no_eager_step_waits(model, static):
    """Without padding, nothing of a step but its end comes back to the host."""
    ids = tokens(2, ROOM, seed=5)
    if static:
        cache = filled(model, ids[:, :PROMPT])
    else:
        cache = DynamicCache(config=model.config)
        model(ids[:, :PROMPT], **cache_argument(model, cache))
    before, steps = usage(model).get(SPARSE, 0), list(steps_of(ids, (1, 1, 4, *(1,) * 70)))
    for i, (part, begin) in enumerate(steps):
        positions = torch.arange(begin, begin + part.shape[1], device="cuda")[None]
        # The first steps compile kernels, and that of a growing cache compares its keys.
        with no_waiting() if i > 2 else nullcontext():
            model(part, position_ids=positions, **cache_argument(model, cache))
    assert usage(model)[SPARSE] == before + 2 * len(steps)


@torch.no_grad()
def test_ten_thousand_steps_in_constant_memory_without_waiting(model):
    ids, steps = tokens(1, PROMPT), 10_000
    cache = filled(model, ids, room=PROMPT + steps + 64)
    model(ids[:, :1], **cache_argument(model, cache))
    step = Graph(model, cache, 1)
    step.positions.fill_(PROMPT + 1)

    def replay():
        step.graph.replay()
        step.ids.copy_(step.logits.argmax(-1))
        step.positions.add_(1)

    for _ in range(10):
        replay()
    torch.cuda.synchronize()
    memory = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    with no_waiting():
        for _ in range(steps - 10):
            replay()
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == memory
    assert int(cache.get_seq_length()) == PROMPT + 1 + steps
    assert step.logits.isfinite().all()
    for one in cache.seerattention_summaries.values():
        blocks = (PROMPT + 1 + steps) // 64
        entries = one.steps.summaries[:, :, : blocks * 64 // one.steps.scorer.tokens_per_summary]
        assert entries.flatten(2).any(-1).all()


# Inductor recommends TF32 where nobody asked for it, and begins its own graphs with an empty one.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32 matrix multiplication:UserWarning")
def test_generate_compiles_around_the_steps(model, monkeypatch):
    """With a static cache generate compiles by itself, in inductor's graphs; steps know the cache again."""
    if model.dtype != torch.float32:
        pytest.skip("in 16 bits fused kernels round otherwise, and the text may be another one")
    ids = tokens(1, PROMPT, seed=7)
    inputs = {"max_new_tokens": 80, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, cache_implementation="static", disable_compile=True, **inputs)
    assert torch.equal(model.generate(ids, **inputs), plain)
    before = usage(model)[SPARSE]
    monkeypatch.setattr(Kept, "compared", None)
    assert torch.equal(model.generate(ids, cache_implementation="static", **inputs), plain)
    assert usage(model)[SPARSE] == before + 2 * 79
