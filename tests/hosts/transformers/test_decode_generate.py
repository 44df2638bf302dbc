"""Text that attached models decode sparsely: every mode of `generate`, padding, static caches, threads."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

from seerattention.engine import call, kept, layer
from seerattention.engine.padding import Lengths
from seerattention.hosts import transformers as host
from seerattention.hosts.transformers import functions, request
from seerattention.hosts.transformers.attach import sparse_layer
from seerattention.hosts.transformers.rotary import Unrotate
from seerattention.measure.observe import Watch

STEP, SPARSE = "dense: decoding step", "sparse: decoding step"


def attached(tiny, kind="llama", decode="token_budget:48", **options):
    model = tiny.make(kind, **options.pop("changes", {}))
    options = {"prefill": "threshold:0.2", "min_tokens": 0, **options}
    return host.attach(model, tiny.gates_for(model, phase="both"), decode=decode, **options)


def generated(model, ids, cache=None, **inputs):
    if cache is not None:
        inputs |= host.cache_argument(model, cache)
    return model.generate(ids, **{"max_new_tokens": 40, "do_sample": False, **inputs})


@torch.no_grad()
def by_hand(model, ids, tokens=40):
    """Greedy text, a token at a time."""
    cache, text = host.cache_argument(model, DynamicCache(config=model.config)), ids
    for _ in range(tokens):
        logits = model(ids, **cache).logits
        ids = logits[:, -1:].argmax(-1)
        text = torch.cat([text, ids], 1)
    return text


def test_greedy(tiny, kind):
    """Dynamic, static, in pieces, by hand: one text, which is not the dense model's."""
    model, ids = attached(tiny, kind), tiny.tokens(2, 70)
    text, layers = by_hand(model, ids), len(tiny.full_layers(model))
    assert host.usage(model) == {"sparse": layers, SPARSE: 39 * layers}
    assert torch.equal(generated(model, ids), text)
    assert torch.equal(generated(model, ids, cache_implementation="static"), text)
    pieces = attached(tiny, kind, prefill="dense")
    assert torch.equal(generated(pieces, ids, prefill_chunk_size=35), generated(pieces, ids))
    with host.dense(model):
        assert not torch.equal(generated(model, ids), text)
    plain = generated(host.detach(model), ids)
    assert torch.equal(plain, generated(tiny.make(kind), ids))


@pytest.mark.parametrize(
    "how", [{"do_sample": True}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}], ids=str
)
def test_sampling_and_beams(tiny, how):
    """With everything read the text is the dense model's, by sparse steps; with less it is another one."""
    ids, texts = tiny.tokens(2, 70), []
    for model in (
        tiny.make(),
        attached(tiny, decode="token_budget:4096", prefill="dense"),
        attached(tiny, prefill="dense"),
    ):
        torch.manual_seed(3)
        texts.append(generated(model, ids, **how))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    assert host.usage(model)[SPARSE] == 2 * 39


def test_beams_keep_what_they_know(tiny, monkeypatch):
    """Beams that trade places take their summaries along: hardly a key is turned back after the first."""
    turned, own = [], Unrotate.__call__

    def counted(self, layer, k, positions):
        turned.append(k.shape[2])
        return own(self, layer, k, positions)

    monkeypatch.setattr(Unrotate, "__call__", counted)
    model = attached(tiny)
    generated(model, tiny.tokens(1, 70), num_beams=4)
    assert sum(turned) <= 2 * 2
    assert host.usage(model)[SPARSE] == 2 * 39


def test_guesses_from_the_prompt_change_no_text(tiny):
    """Each verified token chooses for itself, and what was guessed wrong leaves nothing behind."""
    model, ids = attached(tiny), tiny.tokens(1, 70)
    # The call that takes a prompt would take a guess along and choose for it as for the prompt.
    ids[0, -1] = 2
    plain = generated(model, ids, max_new_tokens=100)
    steps = host.usage(model)[SPARSE]
    assert torch.equal(generated(model, ids, max_new_tokens=100, prompt_lookup_num_tokens=9), plain)
    used = host.usage(model)
    assert set(used) == {"sparse", SPARSE}
    assert used[SPARSE] < 2 * steps


@pytest.mark.parametrize("layers", [1, 2])
def test_a_draft_model_changes_no_text(tiny, layers):
    """Both models decode sparsely, with all of the text read; the one of two layers is always right."""
    options = {"decode": "token_budget:4096", "prefill": "dense"}
    model, ids = attached(tiny, **options), tiny.tokens(1, 70)
    draft = attached(tiny, changes={"num_hidden_layers": layers}, **options)
    draft.generation_config.num_assistant_tokens = 6
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    text = generated(model, ids, assistant_model=draft)
    assert torch.equal(text, generated(tiny.make(), ids))
    for one in (model, draft):
        assert set(host.usage(one)) == {"dense: no policy for prefill", SPARSE}
    if layers == 2:
        assert host.usage(model)[SPARSE] < 2 * 39


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("of", ["llama", "qwen2-mixed", "gpt_oss"])
def test_padding_on_the_left_is_one_call(tiny, ops, of, static):
    """As every row alone, by the ops of one."""
    lengths, width, steps = (70, 33, 48, 17), 70, 30
    model, gold = attached(tiny, of), attached(tiny, of).double()
    ids, mask = tiny.tokens(4, width + steps, seed=3), torch.ones(4, width + steps, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, : width - length] = 0

    def run(model, ids, mask, prompt, static):
        room = {"max_cache_len": 128}
        cache = StaticCache(config=model.config, **room) if static else DynamicCache(config=model.config)
        outs, begin = [], 0
        for end in (prompt, *range(prompt + 1, prompt + 20), prompt + 25, prompt + 30):
            positions = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, begin:]
            more = {"attention_mask": mask[:, :end], "position_ids": positions}
            outs.append(tiny.logits(model, ids[:, begin:end], cache=cache, **more))
            begin = end
        return torch.cat(outs, 1)

    out = run(model, ids, mask, width, static)
    counted = ops.taken()
    assert host.usage(model)[SPARSE] == 21 * 2
    assert counted["block_sparse_decode"] == counted["select_decode_blocks"] == 21 * 2
    for row, length in enumerate(lengths):
        own = ids[row : row + 1, width - length :]
        alone, exact = (run(one, own, torch.ones_like(own), length, False) for one in (model, gold))
        tiny.assert_as_close(out[row, width - length :], alone[0], exact[0])


@pytest.mark.parametrize("static", [False, True])
def test_padding_between_tokens_is_dense(tiny, static):
    """Right padding lies between a prompt and its answer."""
    model, ids = attached(tiny, decode="token_budget:32", prefill="dense"), tiny.tokens(2, 90)
    mask = torch.ones_like(ids)
    mask[1, 50:70] = 0
    outs = []
    for one in (model, tiny.make(), tiny.make().double()):
        room = {"max_cache_len": 96}
        cache = (
            StaticCache(config=model.config, **room)
            if static and one is model
            else DynamicCache(config=model.config)
        )
        begin, found = 0, []
        for end in (70, 71, 72, 76):
            positions = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, begin:]
            more = {"attention_mask": mask[:, :end], "position_ids": positions}
            found.append(tiny.logits(one, ids[:, begin:end], cache=cache, **more))
            begin = end
        outs.append(torch.cat(found, 1)[mask[:, :76].bool()])
    tiny.assert_as_close(*outs)
    assert host.usage(model)[STEP] == 2 * 3


@pytest.mark.parametrize("static", [False, True])
def test_a_mask_that_changes_is_not_taken_for_a_crop(tiny, static):
    """Old tokens become padding, so that blocks begin elsewhere: nothing is known of these from then on."""
    model, ids, mask = attached(tiny), tiny.tokens(2, 90), torch.ones(2, 90)
    room = {"max_cache_len": 96}
    cache = StaticCache(config=model.config, **room) if static else DynamicCache(config=model.config)
    how = []
    for begin, end in ((0, 70), (70, 71), (71, 72), (72, 73), (73, 74)):
        mask[1, : 20 * (end > 72)] = 0
        before = host.usage(model)
        tiny.logits(model, ids[:, begin:end], cache=cache, attention_mask=mask[:, :end])
        after = host.usage(model)
        how += [{name for name in after if after[name] != before.get(name)}]
    missing = (
        "dense: cached keys have no summaries, and cannot be rotated back: their positions are not known"
    )
    assert how == [{"sparse"}, {SPARSE}, {SPARSE}, {missing}, {missing}]


@pytest.mark.parametrize("static", [False, True])
def test_nothing_in_a_step_asks_the_device(tiny, monkeypatch, static):
    """No length comes to the host, so that the graph of a static cache's step is right when it grows."""
    model, ids, room = attached(tiny), tiny.tokens(2, 90), {"max_cache_len": 96}
    cache = StaticCache(config=model.config, **room) if static else DynamicCache(config=model.config)
    tiny.logits(model, ids[:, :70], cache=cache)
    if not static:
        # The first step compares what the cache holds.
        tiny.logits(model, ids[:, 89:], cache=cache)

    def refuse(*args, **kwargs):
        raise AssertionError("the host waits")

    with monkeypatch.context() as patch:
        # On a CPU attention itself looks at lengths.
        patch.setattr(layer, "block_sparse_decode", lambda q, *args, **kwargs: torch.zeros_like(q))
        for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__index__", "cpu"):
            patch.setattr(torch.Tensor, name, refuse)
        with pytest.raises(AssertionError, match="the host waits"):
            int(torch.tensor(1))
        for end in (71, 72, 80):
            tiny.logits(model, ids[:, end - 1 : end], cache=cache)
    assert host.usage(model)[SPARSE] == 2 * (3 if static else 4)


@pytest.fixture
def captured(monkeypatch):
    """A context in which a graph seems to be captured."""

    @contextlib.contextmanager
    def inside():
        with monkeypatch.context() as patch:
            for module in (call, request, functions):
                patch.setattr(module, "capturing", lambda device: True)
            yield

    return inside


@pytest.mark.parametrize("padded", [False, True])
def test_captured_steps(tiny, captured, padded):
    """Nothing is looked at but where a batch's sequences begin, of a mask with all of the cache's columns."""
    model, ids = attached(tiny), tiny.tokens(2, 90)
    mask, outs = torch.ones(2, 96, dtype=torch.long), []
    mask[1, : 20 if padded else 0] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for context in (contextlib.nullcontext, captured):
        cache = StaticCache(config=model.config, max_cache_len=96)
        more = {"attention_mask": mask[:, :70], "position_ids": positions[:, :70]}
        tiny.logits(model, ids[:, :70], cache=cache, **more)
        for part in (slice(70, 71), slice(71, 75), slice(75, 76)):
            more = {"position_ids": positions[:, part]}
            if padded:
                more["attention_mask"] = mask
            with context():
                outs.append(tiny.logits(model, ids[:, part], cache=cache, **more))
        outs.append(
            tiny.logits(model, ids[:, 76:77], cache=cache, **more | {"position_ids": positions[:, 76:77]})
        )
    assert all(map(torch.equal, outs[:4], outs[4:]))
    assert host.usage(model)[SPARSE] == 2 * 8


def test_what_cannot_be_captured_is_refused(tiny, captured):
    """What was written to the cache since may be other tokens, and in a graph nobody would look."""
    model, ids = attached(tiny), tiny.tokens(1, 90)
    cache = StaticCache(config=model.config, max_cache_len=96)
    tiny.logits(model, ids[:, :70], cache=cache)
    for one in cache.layers:
        one.cumulative_length.sub_(10)
    with (
        captured(),
        pytest.raises(RuntimeError, match="cannot be captured before there are summaries of all"),
    ):
        tiny.logits(model, ids[:, 60:61], cache=cache)
    cache = StaticCache(config=model.config, max_cache_len=96)
    with host.dense(model):
        tiny.logits(model, ids[:, :70], cache=cache)
    with captured(), pytest.raises(RuntimeError, match="give the model the prompt"):
        tiny.logits(model, ids[:, 70:71], cache=cache)


def test_calls_whose_tokens_the_host_counts_are_not_captured(tiny, captured):
    """Dense steps, prompts, and windows that are not full; full ones are the same in every step."""
    ids = tiny.tokens(1, 90)
    for kind, decode, prompt, new in (
        ("llama", "dense", 70, 1),
        ("llama", "token_budget:48", 70, 16),
        ("qwen2-mixed", "token_budget:48", 20, 1),
    ):
        model = attached(tiny, kind, decode=decode)
        cache = StaticCache(config=model.config, max_cache_len=96)
        tiny.logits(model, ids[:, :prompt], cache=cache)
        with (
            captured(),
            pytest.raises(NotImplementedError, match="a graph can hold sparse steps of decoding"),
        ):
            tiny.logits(model, ids[:, prompt : prompt + new], cache=cache)
    outs = []
    for context in (contextlib.nullcontext, captured):
        cache = StaticCache(config=model.config, max_cache_len=96)
        tiny.logits(model, ids[:, :70], cache=cache)
        with context():
            outs += [tiny.logits(model, ids[:, token : token + 1], cache=cache) for token in (70, 71)]
    assert all(map(torch.equal, outs[:2], outs[2:]))


def test_compiled(tiny, monkeypatch):
    """As generate compiles by itself on a GPU; the steps know their cache again there too."""
    torch.compiler.reset()
    model, ids = attached(tiny), tiny.tokens(1, 70)
    plain = generated(model, ids, cache_implementation="static", max_new_tokens=12)
    how = CompileConfig(backend="eager", mode=None)
    how._compile_all_devices = True
    monkeypatch.setattr(kept.Kept, "compared", None)
    text = generated(model, ids, cache_implementation="static", compile_config=how, max_new_tokens=12)
    assert torch.equal(text, plain)
    assert host.usage(model) == {"sparse": 4, SPARSE: 44}


def test_prompts_in_pieces_are_no_steps(tiny):
    """`prefill` completes a block densely, whatever decoding does, and then everything is as in one piece."""
    texts = []
    for decode in ("dense", "token_budget:48"):
        model, ids = attached(tiny, decode=decode), tiny.tokens(1, 100)
        cache = DynamicCache(config=model.config)
        host.prefill(model, ids[:, :40], cache, piece_tokens=16)
        texts.append(host.prefill(model, ids[:, 40:], cache, piece_tokens=32).logits)
        assert host.usage(model)[STEP] == 2
    assert torch.equal(*texts)


def test_gradients_stay_dense(tiny):
    model, ids = attached(tiny), tiny.tokens(1, 71)
    cache = host.cache_argument(model, DynamicCache(config=model.config))
    model(ids[:, :70], **cache)
    model(ids[:, 70:], **cache).logits.sum().backward()
    assert host.usage(model)[STEP] == 2
    assert model.model.layers[0].self_attn.q_proj.weight.grad.any()


@pytest.mark.parametrize("min_tokens", [None, 80])
def test_dense_where_that_is_faster(tiny, monkeypatch, min_tokens):
    """Below a length, and where the policy reads everything."""
    model, ids = attached(tiny, min_tokens=min_tokens), tiny.tokens(1, 90)
    handler = sparse_layer(model)
    known = handler.crossovers["cpu"]
    handler.crossovers["cpu"] = type(known)("an abacus", 0, decode_dense_below=80)
    generated(model, ids[:, :70], max_new_tokens=21)
    used = host.usage(model)
    why = {None: "fewer than 80 tokens (measured on an abacus)", 80: "fewer than 80 tokens"}[min_tokens]
    assert used[f"{STEP}, {why}"] == 2 * 9
    assert used[SPARSE] == 2 * 11
    if min_tokens is None:
        host.set_policy(model, decode="token_budget:96")
        generated(model, ids[:, :80], max_new_tokens=22)
        used = host.usage(model)
        assert used[f"{STEP}, the policy reads everything"] == 2 * 16
        assert used[SPARSE] == 2 * (11 + 5)


def test_steps_are_observed_as_calls(tiny):
    """Density and recall of decoding, of a padded batch too."""
    watch, ids = Watch(rows=1), tiny.tokens(2, 80)
    model = attached(tiny, prefill="dense", observe=watch)
    mask = torch.ones(2, 80, dtype=torch.long)
    mask[1, :16] = 0
    cache = DynamicCache(config=model.config)
    for part in (slice(0, 70), slice(70, 71), slice(71, 80)):
        more = {
            "attention_mask": mask[:, : part.stop],
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, part],
        }
        tiny.logits(model, ids[:, part], cache=cache, **more)
    # Rows of 71 to 80 and of 55 to 64 tokens read 3 blocks of theirs, of two layers and two KV heads.
    assert watch.valid == 4 * (10 * 5 + 10 * 4)
    assert watch.read == 4 * (20 * 3)
    assert 0 < watch.recall < 1


def test_threads(tiny):
    """Requests of two threads on one model, sparse and dense."""
    model = attached(tiny)
    jobs = [(tiny.tokens(1, 60 + 7 * i, seed=i), i % 3 == 2) for i in range(12)]

    def serve(job):
        ids, dense = job
        with host.dense(model) if dense else contextlib.nullcontext():
            return generated(model, ids, max_new_tokens=12)

    alone = [serve(job) for job in jobs]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(serve, jobs))
    assert all(map(torch.equal, alone, together))


def test_lengths_of_a_batch():
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]).bool()
    about = {"batch": 3, "device": torch.device("cpu")}
    for held in (6, torch.tensor(6)):
        found = Lengths.of(real, held, 2, **about)
        assert found.keys.tolist() == [4, 6, 3]
        assert found.starts.tolist() == found.begins == [2, 0, 3]
        assert found.known == ([4, 6, 3] if isinstance(held, int) else None)
        trusted = Lengths.of(real, held, 2, trust=True, **about)
        assert trusted.keys.tolist() == [4, 6, 3]
    # Columns of a buffer that are not in use do not count; too few, padding between tokens, new padding do.
    assert Lengths.of(real, torch.tensor(5), 1, **about).keys.tolist() == [3, 5, 2]
    for mask, held, new in ((real, torch.tensor(7), 1), (real, 5, 1), (real, 6, 4), (real.flip(1), 6, 1)):
        assert Lengths.of(mask, held, new, **about) is None
    all_real = Lengths.of(torch.ones_like(real), 6, 1, **about)
    assert all_real.starts is None
    assert all_real.known == [6, 6, 6]
