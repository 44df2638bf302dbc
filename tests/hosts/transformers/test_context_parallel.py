"""Processes that share a prompt choose, compute and decode what one process does."""

import copy
import os
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, DynamicCache

from seerattention.baselines.quest import Quest
from seerattention.engine import steps
from seerattention.engine.layer import SparseLayer
from seerattention.hosts import transformers as host
from seerattention.parallel.context_layer import NOT_SUMMARISED
from seerattention.policies import Calibrated, Calibration
from tests.hosts.transformers.conftest import BLOCK, assert_as_close, gates_for, make
from tests.hosts.transformers.ranks import load as load_spread
from tests.hosts.transformers.ranks import together

FULL = {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2}
#: A KV head less than there are processes; sinks; soft-caps.
MODELS = {
    "llama": {"num_key_value_heads": 1, "vocab_size": 96},
    "gpt_oss": {"vocab_size": 96, **FULL},
    "gemma2": {"vocab_size": 96, **FULL},
}
SIZES = [2, 4]
FOLLOWING = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
#: No block divides them; the last is shorter than what one process of four has.
LENGTHS = [27 * BLOCK + 5, 12 * BLOCK - 3, BLOCK + 1, 3]
WHOLE, FEW = 100 * BLOCK, 4 * BLOCK
#: Scorer, policies of prefill and decoding, tokens of a piece.
ASKED = {
    "decoding": ("gates", "top_k:0.4", f"token_budget:{5 * BLOCK}", WHOLE),
    "pieces": ("gates", "top_k:0.4,sink_blocks=1", f"token_budget:{4 * BLOCK}", FEW),
    "last rows": ("gates", "top_k:0.3,dense_last_rows=3", "dense", FEW),
    "calibrated": ("gates", "calibrated", "dense", WHOLE),
    "baseline": ("baseline", "top_k:0.4", f"token_budget:{4 * BLOCK}", WHOLE),
    "dense": ("gates", "dense", f"token_budget:{4 * BLOCK}", WHOLE),
}


def prompts(lengths, seed=1):
    """Rows of these lengths, padded on the left, and their mask."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    generator = torch.Generator().manual_seed(seed)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(3, 96, (length,), generator=generator)
        mask[row, -length:] = 1
    return ids, mask


def load(folder, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if model.config.model_type == "gpt_oss":
        # The other implementations have no fp64.
        model.set_experts_implementation("eager")
    # Random text never ends by itself.
    model.generation_config.eos_token_id = None
    return model


def cache_for(model):
    """One that the processes there are share, or a plain one."""
    if not dist.is_initialized():
        return DynamicCache(config=model.config)
    return host.ContextParallelCache(model, init_device_mesh("cpu", (dist.get_world_size(),)))


class Blocks:
    """What was read: by layer, length of the prompt, and place of the block of queries or of the token."""

    def __init__(self):
        self.seen, self.steps = {}, {}

    def __call__(self, layer, call, selection):
        mask, (block, _) = selection.to_mask(), selection.block_size
        # Steps of decoding are not observed in a cache that is spread.
        if block == 1:
            return
        assert len(mask) == 1
        for row in range(mask.shape[2]):
            place = call.rows.first // block + row
            key = layer, call.prompt_tokens or call.rows.num_keys, place
            assert key not in self.seen
            self.seen[key] = mask[0, :, row, : place + 1]

    def stepped(self, step, part, lengths):
        """Take note of a step of decoding of prompts of these lengths."""
        for row, length in enumerate(lengths):
            known = step.lengths.known[row]
            read = part.why
            if part.selection is not None:
                read = part.selection.to_mask()[row, :, :, : -(-known // BLOCK)]
            self.steps[step.layer, length, known] = read


@contextmanager
def watched(blocks, lengths):
    """Take note of steps of decoding."""
    own = SparseLayer.choose_step

    def choose(layer, step):
        part = own(layer, step)
        blocks.stepped(step, part, lengths)
        return part

    SparseLayer.choose_step = choose
    yield
    SparseLayer.choose_step = own


@torch.no_grad()
def answers(folder, gates, dtype=torch.float32, asked=ASKED):
    """What follows prompts, and what was read of them."""
    model, found = load(folder, dtype), {}
    scorers = {"gates": host.load_gates(gates), "baseline": Quest((BLOCK, BLOCK))}
    ids, mask = prompts(LENGTHS)
    for name, (scorer, prefill, decode, piece) in asked.items():
        blocks = Blocks()
        host.attach(model, scorers[scorer], prefill=prefill, decode=decode, min_tokens=0, observe=blocks)
        batches = [(ids, mask)]
        if not dist.is_initialized():
            batches = [(ids[i : i + 1, -n:], mask[i : i + 1, -n:]) for i, n in enumerate(LENGTHS)]
        rows = []
        for batch, real in batches:
            cache, given = cache_for(model), {}
            if dist.is_initialized():
                given["attention_mask"] = real
            logits = host.prefill(model, batch, cache, piece_tokens=piece, **given).logits[:, -1]
            more = torch.cat([batch, logits.argmax(-1, keepdim=True)], 1)
            real = torch.cat([real, torch.ones_like(real[:, :1])], 1)
            with watched(blocks, LENGTHS if dist.is_initialized() else [batch.shape[1]]):
                out = model.generate(
                    more, **FOLLOWING, **host.cache_argument(model, cache), attention_mask=real,
                    output_logits=True, return_dict_in_generate=True,
                )  # fmt: skip
                # Several tokens at once, as a user's next words.
                places = torch.arange(5) + real.sum(1, keepdim=True) + FOLLOWING["max_new_tokens"] - 1
                words = ids[:1, -5:].expand(len(batch), -1)
                some = model(words, position_ids=places, **host.cache_argument(model, cache))
            following = torch.cat([torch.stack(out.logits, 1), some.logits], 1)
            rows.append((logits, out.sequences[:, batch.shape[1] :], following))
        found[name] = *(torch.cat(part) for part in zip(*rows, strict=True)), blocks.seen, blocks.steps
        host.detach(model)
    return found


@torch.no_grad()
def sides(folder, gates):
    """What follows prompts that are padded on the left and on the right, and what was counted."""
    model, found = load(folder), []
    ids, mask = prompts(LENGTHS)
    for left in (True, False):
        host.attach(model, host.load_gates(gates), "top_k:0.4", decode="dense", min_tokens=0)
        if not left:
            turned = [(row[real.bool()], row[~real.bool()]) for row, real in zip(ids, mask, strict=True)]
            ids, mask = torch.stack([torch.cat(row) for row in turned]), mask.flip(1)
        cache = cache_for(model)
        first = host.prefill(model, ids, cache, attention_mask=mask).logits[:, -1].argmax(-1, keepdim=True)
        more, real = torch.cat([ids, first], 1), torch.cat([mask, torch.ones_like(first)], 1)
        before = sum(host.usage(model).values())
        tokens = model.generate(more, **FOLLOWING, **host.cache_argument(model, cache), attention_mask=real)
        found.append((tokens[:, ids.shape[1] :], sum(host.usage(model).values()) - before))
    return found


def refusals(folder, gates):
    """What is said where something does not fit."""
    model, said = load(folder), {}

    def refused(name, act, *args, **options):
        with pytest.raises((NotImplementedError, ValueError)) as error:
            act(*args, **options)
        said[name] = str(error.value)

    mesh, (ids, mask) = init_device_mesh("cpu", (2,)), prompts(LENGTHS)
    refused("nothing attached", host.prefill, model, ids, None)
    host.attach(model, host.load_gates(gates), "top_k:0.4", min_tokens=0)
    grid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("context", "model"))
    refused("two dimensions", host.ContextParallelCache, model, grid)
    refused("device", host.ContextParallelCache, model, SimpleNamespace(ndim=1, device_type="cuda"))
    # One process has another prompt; later tries use groups as if nothing had been.
    own = ids[:1] + int(os.environ["RANK"])
    refused("unlike", host.prefill, model, own, host.ContextParallelCache(model, mesh))
    # Of the same length, and of the same sum by places.
    own = torch.tensor([[5, 3]] if int(os.environ["RANK"]) else [[3, 4]])
    refused("unlike by a little", host.prefill, model, own, host.ContextParallelCache(model, mesh))
    own = mask.clone()
    own[0, : int(os.environ["RANK"])] = 0
    cache = host.ContextParallelCache(model, mesh)
    refused("unlike masks", host.prefill, model, ids, cache, attention_mask=own)
    piece = 64 + 32 * int(os.environ["RANK"])
    refused("unlike pieces", host.prefill, model, ids, cache, piece_tokens=piece)
    refused("pieces", host.prefill, model, ids, cache, piece_tokens=BLOCK)
    # What was refused left nothing behind.
    host.prefill(model, ids, cache)
    holes = mask.clone()
    holes[0, 7] = 0
    refused("holes", host.prefill, model, ids, host.ContextParallelCache(model, mesh), attention_mask=holes)
    cache = host.ContextParallelCache(model, mesh)
    refused("unfilled", model, ids, **host.cache_argument(model, cache))
    host.prefill(model, ids, cache)
    refused("a second prompt", host.prefill, model, ids, cache)
    refused("cropped", cache.crop, 5)
    refused("copied", copy.deepcopy, cache)
    refused("gradient", model, ids[:, :1], **host.cache_argument(model, cache))
    cache.reset()
    host.prefill(model, ids, cache)
    with torch.no_grad():
        refused("many following", model, ids[:, :BLOCK], **host.cache_argument(model, cache))
    places = torch.zeros(2, 1, dtype=torch.int64)
    refused("rows", model, ids[:2, :1], position_ids=places, **host.cache_argument(model, cache))
    refused("nothing new", model.generate, ids, **FOLLOWING, **host.cache_argument(model, cache))
    padded = host.ContextParallelCache(model, mesh)
    host.prefill(model, ids, padded, attention_mask=mask)
    refused("padding forgotten", model, ids[:, :1], **host.cache_argument(model, padded))
    with host.dense(model):
        refused("not attached", model, ids[:, :1], **host.cache_argument(model, cache))
    spread = load_spread(folder.parent / "gpt_oss")
    host.attach(spread, gates_for(spread), "top_k:0.4")
    refused("heads too", host.ContextParallelCache, spread, mesh)
    windows = make("gemma2", vocab_size=96)
    host.attach(windows, gates_for(windows), "top_k:0.4")
    refused("windows", host.ContextParallelCache, windows, mesh)
    longrope = make("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    refused("rope", host.ContextParallelCache, longrope, mesh)
    host.attach(model, gates_for(model, layers_per_gate=2), "top_k:0.4")
    refused("shared layers", host.prefill, model, ids, host.ContextParallelCache(model, mesh))
    return said


SAID = {
    "nothing attached": "nothing is attached to this model",
    "two dimensions": "this one has 2: ('context', 'model'); give mesh[name]",
    "device": "the model is on cpu and the mesh is of cuda devices",
    "unlike": "they have 1 x 437 by 8192 and 1 x 437 by 8192 tokens, or others of the same number",
    "unlike by a little": "they have 1 x 2 by 8192 and 1 x 2 by 8192 tokens",
    "unlike masks": "the same whole prompt, mask and piece_tokens",
    "unlike pieces": "they have 4 x 437 by 64 and 4 x 437 by 96 tokens",
    "pieces": "2 processes need pieces of at least 32 tokens each, two blocks of 16, got piece_tokens=16",
    "holes": "has padding on its left or right, and some tokens",
    "unfilled": "comes to a ContextParallelCache by prefill(model, input_ids, cache)",
    "a second prompt": "takes one prompt and what follows it",
    "cropped": "cannot be copied, cropped or reordered",
    "copied": "cannot be copied, cropped or reordered",
    "gradient": "no gradient passes between processes that share a prompt",
    "many following": "a few tokens at a time",
    "rows": "cannot be copied, cropped or reordered",
    "nothing new": "give generate what prefill was given and at least a token more",
    "padding forgotten": "holds [437, 189, 17, 3] tokens of its rows, and 1 more come at positions [437, 4",
    "not attached": "is read by attached models alone",
    "heads too": "2 processes share this model's heads",
    "windows": "has layers with windows; a window's keys lie on other processes",
    "rope": "RoPE is of type dynamic; no process sees how long the text is",
    "shared layers": "distil gates with layers_per_gate 1",
}


def shared(root):
    """All of it in one process of several."""
    found = {name: answers(root / name, root / f"{name} gates", asked=few(name)) for name in MODELS}
    if dist.get_world_size() == 2:
        found["sides"] = sides(root / "llama", root / "llama gates")
        found["refused"] = refusals(root / "llama", root / "llama gates")
    return found


def few(name):
    """What is asked of a model: of the first one everything."""
    return ASKED if name == "llama" else {call: ASKED[call] for call in ("calibrated", "pieces")}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of models and of their calibrated gates."""
    folder = tmp_path_factory.mktemp("spread")
    for name, changes in MODELS.items():
        make(name, **changes).save_pretrained(folder / name)
        own = gates_for(load(folder / name))
        laws = {
            layer: tuple((-0.4 - 0.1 * head - 0.1 * layer, -0.7, 0.0) for head in range(4))
            for layer, _ in own.items()
        }
        host.save_gates(own, folder / f"{name} gates", policy="top_k:0.5")
        calibration = Calibration("recall", 0.9, 256, (BLOCK, BLOCK), 0.0, None, laws)
        host.save_calibration(folder / f"{name} gates", Calibrated(calibration))
    return folder


@pytest.fixture(scope="module")
def alone(root):
    """What one process gives, and what it gives in float64."""
    return {
        name: [
            answers(root / name, root / f"{name} gates", dtype, few(name))
            for dtype in (torch.float32, torch.float64)
        ]
        for name in MODELS
    }


@pytest.fixture(scope="module", params=SIZES)
def found(request, root):
    """What every process of so many gives."""
    return together(request.param, root, shared, root)


@pytest.mark.parametrize("name", MODELS)
def test_processes_that_share_a_prompt(alone, found, name):
    expected, gold = alone[name]
    for call in few(name):
        assert_same([of_rank[name][call] for of_rank in found], expected[call], gold[call])


def assert_same(ranks, expected, gold):
    """The same answers within the error budget, of the same blocks."""
    logits, tokens, following, blocks, steps = expected
    seen = {}
    for one in ranks:
        assert torch.equal(one[1], tokens)
        assert_as_close(one[0], logits, gold[0])
        assert_as_close(one[2], following, gold[2])
        # Every process chooses in decoding, and each for its own queries in prefill.
        assert_alike(one[4], steps, gold[4])
        assert not seen.keys() & one[3].keys()
        seen |= one[3]
    assert_alike(seen, blocks, gold[3])


def assert_alike(found, expected, gold):
    """The same blocks everywhere."""
    assert found.keys() == expected.keys()
    for key, read in expected.items():
        if isinstance(read, str):
            assert found[key] == read
            continue
        assert torch.equal(gold[key], read), "float64 reads others; take other prompts"
        assert torch.equal(found[key], read), key


def test_padding_on_the_right_is_padding_on_the_left(found):
    if len(found) == 2:
        for of_rank in found:
            (left, steps), (right, others) = of_rank["sides"]
            assert torch.equal(left, right)
            # One of every layer and token, dense ones too.
            assert steps == others == 2 * FOLLOWING["max_new_tokens"]


def test_what_does_not_fit_is_refused(found):
    if len(found) == 2:
        for of_rank in found:
            assert of_rank["refused"].keys() == SAID.keys()
            for name, part in SAID.items():
                assert part in of_rank["refused"][name], name


@pytest.fixture
def one(root, tmp_path):
    """An attached model, a prompt and its first token, of one process that could have others."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    model, ids = load(root / "llama"), prompts(LENGTHS[:1])[0]
    host.attach(model, host.load_gates(root / "llama gates"), "top_k:0.4", decode=DECODE, min_tokens=0)
    plain = DynamicCache(config=model.config)
    first = host.prefill(model, ids, plain, logits_to_keep=1).logits.argmax(-1)
    yield model, ids, torch.cat([ids, first], 1)
    dist.destroy_process_group()


DECODE = f"token_budget:{4 * BLOCK}"


def following(model, cache, tokens, count):
    """The text with so many tokens more."""
    options = FOLLOWING | {"max_new_tokens": count, "attention_mask": torch.ones_like(tokens)}
    return model.generate(tokens, **options, **host.cache_argument(model, cache))


def test_decoding_that_began_in_inference_mode_goes_on(one):
    model, ids, more = one
    found = []
    for mode in (torch.inference_mode, torch.no_grad):
        cache = cache_for(model)
        with mode():
            host.prefill(model, ids, cache)
            begun = following(model, cache, more, 2)
        found.append(following(model, cache, begun.clone(), BLOCK + 2))
    assert torch.equal(*found)


@pytest.mark.parametrize("first", ["sparse", "dense"])
def test_tokens_that_were_not_summarised_are_read_densely(one, first):
    """Decoding is dense for a while, at once or later, and then other gates decode."""
    model, ids, more = one
    host.add_gates(model, "other", gates_for(model, block_size=2 * BLOCK), "top_k:0.4", decode=DECODE)
    cache = cache_for(model)
    host.prefill(model, ids, cache)
    tokens = following(model, cache, more, 2) if first == "sparse" else more
    if first == "sparse":
        # Until now these were summarised, by others.
        host.set_gates(model, "other")
        tokens = following(model, cache, tokens, 1)
        host.set_gates(model, "default")
    host.set_policy(model, decode="dense")
    tokens = following(model, cache, tokens, 3)
    host.set_policy(model, decode=DECODE)
    following(model, cache, tokens, 4)
    counted = {"dense: decoding step": 2 * 3, NOT_SUMMARISED: 2 * 4}
    if first == "sparse":
        counted = {"sparse: decoding step": 2 * 2, "dense: decoding step": 2 * 3, NOT_SUMMARISED: 2 * 5}
    assert {why: count for why, count in host.usage(model).items() if "decoding" in why} == counted


def test_summaries_of_a_long_answer_find_room(one, monkeypatch):
    model, ids, more = one
    found = []
    for _ in range(2):
        cache = cache_for(model)
        host.prefill(model, ids, cache)
        found.append(following(model, cache, more, 2 * BLOCK + 3))
        monkeypatch.setattr(steps, "ample", lambda tokens: tokens)
    assert torch.equal(*found)
    assert not any("dense" in why for why in host.usage(model))


def test_blocks_that_divide_neither_stay_together(one):
    """Gates for decoding have blocks of 24 tokens, those for prefill of 16: chunks are of 48."""
    model, ids, more = one
    own, size = host.new_gates(model, block_size=BLOCK), BLOCK * 3 // 2
    others = gates_for(model, block_size=size, q_sub_block=size // 2, k_sub_block=size // 2)
    host.attach(model, own, "top_k:0.4", decode=f"token_budget:{4 * size}", decode_gates=others, min_tokens=0)
    found = []
    for cache in (DynamicCache(config=model.config), cache_for(model)):
        host.prefill(model, ids, cache, logits_to_keep=1)
        found.append(following(model, cache, more, 2 * size))
    assert torch.equal(*found)
    assert cache.context.block == 48


def dies(folder, gates):
    """One process ends without a word while the other waits for its keys."""
    model = load(folder)
    host.attach(model, host.load_gates(gates), "top_k:0.4", min_tokens=0)
    cache = cache_for(model)
    if os.environ["RANK"] == "1":
        os._exit(3)
    host.prefill(model, prompts(LENGTHS)[0], cache)


def test_a_process_that_dies_ends_all(root):
    with pytest.raises((multiprocessing.ProcessExitedException, multiprocessing.ProcessRaisedException)):
        together(2, root, dies, root / "llama", root / "llama gates")
