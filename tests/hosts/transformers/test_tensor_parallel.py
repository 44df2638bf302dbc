"""Processes that share a model's heads choose and compute what one process does."""

import os

import pytest
import torch
from torch import multiprocessing
from transformers import DynamicCache

from seerattention.baselines.quest import Quest
from seerattention.hosts import transformers as host
from seerattention.measure.bundled import TEACHER, load_teacher_gates
from seerattention.policies import Calibrated, Calibration
from tests.hosts.transformers.batches import serve
from tests.hosts.transformers.conftest import BLOCK, assert_as_close, gates_for, make
from tests.hosts.transformers.ranks import load, together

SHAPE = {"vocab_size": 96, "hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
# Plain heads; norms of q and k; windows and soft-caps; all heads on every process.
NAMES = ["llama", "qwen3", "gemma2", "phi3"]
SIZES = [2, 4]
FOLLOWING = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def prompts(batch, length, vocab=SHAPE["vocab_size"], seed=1):
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


class Calls:
    """What an attached model answers and which blocks it reads, call by call."""

    def __init__(self):
        self.found, self.seen = {}, []

    def __call__(self, layer, call, selection):
        self.seen.append((layer, selection.to_mask()))

    def keep(self, name, answer):
        self.found[name], self.seen = (answer, self.seen), []


@torch.no_grad()
def answers(folder, gates, dtype=torch.float32, saved=None):
    """Of a model, or of a process's part of it: prompts at once, padded and in pieces, and decoding."""
    model, calls = load(folder, dtype), Calls()
    # No block divides them.
    ids, batch = prompts(1, 18 * BLOCK + 5), prompts(3, 12 * BLOCK - 3, seed=2)
    mask = torch.ones_like(batch)
    mask[1, : 2 * BLOCK + 3] = mask[2, : 4 * BLOCK + 1] = 0
    plain = model(ids).logits
    host.attach(model, host.load_gates(gates), min_tokens=0, observe=calls)
    calls.keep("calibrated", model(ids).logits)
    if saved is not None:
        host.save_gates(model, saved / os.environ["RANK"])
    host.set_policy(model, "top_k:0.7,sink_blocks=1", decode=f"token_budget:{5 * BLOCK}")
    calls.keep("prompt", model(ids).logits)
    calls.keep("padded", model(batch, attention_mask=mask).logits * mask[..., None])
    cache = DynamicCache(config=model.config)
    calls.keep("pieces", host.prefill(model, ids, cache, piece_tokens=7 * BLOCK).logits)
    more = torch.cat([ids, ids[:, :1]], 1)
    calls.keep("after pieces", model.generate(more, **FOLLOWING, **host.cache_argument(model, cache)))
    calls.keep("decoded", model.generate(batch, attention_mask=mask, **FOLLOWING))
    host.set_policy(model, "calibrated")
    calls.keep("calibrated, padded", model(batch, attention_mask=mask).logits * mask[..., None])
    heads = model.get_decoder().layers[0].self_attn.attn_gate.config.num_heads
    usage = dict(host.usage(model))
    host.detach(model)
    return calls.found, {"usage": usage, "detached": torch.equal(model(ids).logits, plain)}, heads


def uses(folder, gates, dtype=torch.float32):
    """Of llama: other gates and a baseline, a static cache, a gradient, requests served together."""
    model, calls = load(folder, dtype), Calls()
    ids = prompts(1, 12 * BLOCK + 5, seed=3)
    deciding = host.load_gates(gates)
    # One score per KV head.
    torch.manual_seed(9)
    stepping = host.new_gates(model, block_size=BLOCK, phase="decode")
    with torch.no_grad():
        host.attach(
            model, deciding, "top_k:0.7", decode_gates=stepping, decode=f"token_budget:{4 * BLOCK}",
            min_tokens=0, observe=calls,
        )  # fmt: skip
        calls.keep("gates of its own", model.generate(ids, **FOLLOWING))
        calls.keep("static", model.generate(ids, **FOLLOWING, cache_implementation="static"))
        host.add_gates(model, "quest", Quest((BLOCK, BLOCK)), "top_k:0.7")
        host.set_gates(model, "quest")
        calls.keep("baseline", model(ids).logits)
        # One gate for both layers.
        host.add_gates(model, "fewer", gates_for(model, layers_per_gate=2), "top_k:0.7")
        host.set_gates(model, "fewer")
        calls.keep("fewer gates", model(ids).logits)
        host.set_gates(model, "default")
        host.set_policy(model, decode="dense")
        served = torch.tensor(serve(model, [ids[0, :n].tolist() for n in (133, 40, 70)]))
        # Which requests come in one pass depends on when they arrive.
        calls.seen.sort(key=lambda read: (read[0], read[1].shape[3]))
        calls.keep("served", served)
    model(ids, labels=ids, use_cache=False).loss.backward()
    calls.keep("gradient", model.get_decoder().layers[0].input_layernorm.weight.grad)
    return calls.found


def taught(folder):
    """A model's identity, and new gates for it."""
    model = load(folder)
    return host.BaseInfo.of(model), host.base_checksum(model), gates_for(model).named_weights()


@torch.no_grad()
def bundled(dtype=torch.float32):
    """The teacher with its own gates: a prompt, then decoding."""
    model, calls = load(TEACHER, dtype), Calls()
    reading = {"prefill": "top_k:0.6", "decode": "token_budget:192", "min_tokens": 0}
    host.attach(model, load_teacher_gates(), **reading, observe=calls)
    ids = prompts(1, 453, 8192)
    calls.keep("prompt", model(ids).logits)
    calls.keep("decoded", model.generate(ids, **{**FOLLOWING, "max_new_tokens": 3}))
    return calls.found


def refusal(act, *args, **options):
    """What a call that is refused says."""
    with pytest.raises((NotImplementedError, ValueError)) as refused:
        act(*args, **options)
    return str(refused.value)


def shared(folders, gates, out):
    """All of it in one process of several."""
    found = {}
    for name, folder in folders.items():
        (out / name).mkdir(exist_ok=True)
        found[name] = *answers(folder, gates[name], saved=out / name), taught(folder)
    found["uses"] = uses(folders["llama"], gates["llama"])
    model = load(folders["llama"])
    with torch.inference_mode():
        host.attach(model, host.load_gates(gates["llama"]), "top_k:0.4")
        host.detach(model)
    found["refused"] = refusal(host.attach, model, host.load_gates(gates["other"]), "top_k:0.4")
    if out.name == "2":
        found["teacher"] = bundled()
    else:
        found["uneven"] = refusal(host.attach, load(TEACHER), load_teacher_gates(), "top_k:0.4")
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folders of models, and of calibrated gates for each; llama's for another llama too."""
    root = tmp_path_factory.mktemp("shared")
    folders, gates = {}, {}
    for name in (*NAMES, "other"):
        model = make("llama", **SHAPE, seed=1) if name == "other" else make(name, **SHAPE)
        model.save_pretrained(root / name)
        if name != "other":
            folders[name] = root / name
        own, gates[name] = gates_for(load(root / name)), root / f"gates of {name}"
        # Of every head another law.
        laws = {
            layer: tuple((-0.4 - 0.1 * head - 0.1 * layer, -0.7, 0.0) for head in range(8))
            for layer, _ in own.items()
        }
        host.save_gates(own, gates[name], policy="top_k:0.5")
        calibration = Calibration("recall", 0.9, 256, (BLOCK, BLOCK), 0.0, None, laws)
        host.save_calibration(gates[name], Calibrated(calibration))
    return root, folders, gates


@pytest.fixture(scope="module", params=SIZES)
def found(request, files):
    """What every process of so many gives; and the folder that they saved gates into."""
    root, folders, gates = files
    out = root / str(request.param)
    out.mkdir()
    return together(request.param, root, shared, folders, gates, out), out


def assert_same(ranks, expected, gold, *, whole=False):
    """The same answers, within the error budget, of the same blocks head by head."""
    for call, (answer, chosen) in expected.items():
        for one, _ in (of_rank[call] for of_rank in ranks):
            if answer.is_floating_point():
                assert_as_close(one, answer, gold[call][0])
            else:
                assert torch.equal(one, answer), call
        for index, (layer, mask) in enumerate(chosen):
            assert all(of_rank[call][1][index][0] == layer for of_rank in ranks)
            assert torch.equal(gold[call][1][index][1], mask), "float64 reads others; take other prompts"
            of_ranks = [of_rank[call][1][index][1] for of_rank in ranks]
            if whole:
                assert all(torch.equal(own, mask) for own in of_ranks), (call, index)
            else:
                assert torch.equal(torch.cat(of_ranks, 1), mask), (call, index)
        assert all(len(of_rank[call][1]) == len(chosen) for of_rank in ranks)
        # Blocks are chosen, and not alike for all heads.
        assert any(not torch.equal(mask[:, :1].expand_as(mask), mask) for _, mask in chosen), call


@pytest.mark.parametrize("name", NAMES)
def test_every_process_chooses_for_its_heads(files, found, name):
    _, folders, gates = files
    ranks, _ = found
    expected, more, heads = answers(folders[name], gates[name])
    gold, _, _ = answers(folders[name], gates[name], torch.float64)
    whole = name == "phi3"
    assert_same([of_rank[name][0] for of_rank in ranks], expected, gold, whole=whole)
    assert more["detached"]
    assert all(of_rank[name][1] == more for of_rank in ranks)
    assert all(of_rank[name][2] * (1 if whole else len(ranks)) == heads for of_rank in ranks)


@pytest.mark.parametrize("name", NAMES)
def test_gates_on_disk_are_whole(files, found, name):
    """Every process saves what it loaded, knows the model by its weights, and makes the same new gates."""
    _, folders, gates = files
    ranks, out = found
    base, checksum, made = taught(folders[name])
    assert base.fingerprint
    for rank, of_rank in enumerate(ranks):
        files_of_rank = sorted((out / name / str(rank)).iterdir())
        assert [file.name for file in files_of_rank] == sorted(file.name for file in gates[name].iterdir())
        assert all(file.read_bytes() == (gates[name] / file.name).read_bytes() for file in files_of_rank)
        assert of_rank[name][3][:2] == (base, checksum)
        assert all(torch.equal(of_rank[name][3][2][key], weight) for key, weight in made.items())


def test_whatever_else_is_done_with_gates(files, found):
    _, folders, gates = files
    ranks, _ = found
    given = folders["llama"], gates["llama"]
    assert_same([of_rank["uses"] for of_rank in ranks], uses(*given), uses(*given, torch.float64))


def test_the_bundled_teacher_and_gates_of_others(found):
    ranks, _ = found
    assert all("its attention weights differ (fingerprint)" in of_rank["refused"] for of_rank in ranks)
    if len(ranks) == 2:
        assert_same([of_rank["teacher"] for of_rank in ranks], bundled(), bundled(torch.float64))
    else:
        uneven = "4 processes share 6 query heads and 2 KV heads; each process needs whole heads"
        assert all(of_rank["uneven"].startswith(uneven) for of_rank in ranks)


def broken_plan(folder, gates):
    """Keys and values of all heads beside queries of some."""
    plan = dict.fromkeys((f"layers.*.self_attn.{x}_proj" for x in "kv"), "colwise_gather_output")
    own = {"layers.*.self_attn.q_proj": "colwise", "layers.*.self_attn.o_proj": "rowwise"}
    model = load(folder, plan={**plan, **own})
    return refusal(host.attach, model, host.load_gates(gates), "top_k:0.4")


def dies(folder):
    """One process ends without a word while the other waits for its part of the weights."""
    if os.environ["RANK"] == "1":
        os._exit(3)
    host.base_checksum(load(folder))


def test_plans_that_split_groups_are_refused(files):
    root, folders, gates = files
    said = together(2, root, broken_plan, folders["llama"], gates["llama"])
    assert all("k_proj: colwise_gather_output, q_proj: colwise" in one for one in said)
    assert all("leave the plan to the model" in one for one in said)


def test_a_process_that_dies_ends_all(files):
    root, folders, _ = files
    with pytest.raises((multiprocessing.ProcessExitedException, multiprocessing.ProcessRaisedException)):
        together(2, root, dies, folders["llama"])
