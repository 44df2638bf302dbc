"""Whatever is in files and strings that come from others ends in a sentence: seeded, bounded, in seconds.

Nothing in them runs, and nothing is allocated before their sizes were compared: memory has a limit here.
"""

from __future__ import annotations

import itertools
import json
import pickle
import random
import shutil
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from seerattention import attach, detach, load_gates
from seerattention.evals.config import read_config
from seerattention.evals.records import RecordFile
from seerattention.evals.report import page, read_results
from seerattention.hosts.transformers import new_gates, save_gates
from seerattention.measure import bundled
from seerattention.policies import Calibrated, Calibration, parse
from seerattention.settings import build, read
from seerattention.train import Distillation, DistillConfig, Distiller, Finetuning, TextWindows
from seerattention.train.data import Packs, read_tokens, text_documents

#: What a person can do something about.
SENTENCES = (ValueError, NotImplementedError, OSError)

#: More than anything here needs, less than what sizes in a file may ask for.
MEMORY = 3 << 30

VALUES: list[Any] = [
    None, True, -1, 0, 1, 3, 2**31, 10**9, 2**70, 10**400, -0.0, 0.5, 1e300, float("nan"), float("inf"),
    "", "x", "nan", "[/b]", "\u2028", "\ud800", "a" * 10_000, [], {}, [1], [[]], {"a": 1}, [None] * 3,
    ["max", "max"], "top_k:2", "__class__", "../../x",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _memory():
    """Give this process an end of its memory near by."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    status = Path("/proc/self/statm")
    used = int(status.read_text().split()[0]) * resource.getpagesize() if status.exists() else 1 << 40
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def refused_or_right(refusals: list[str], what: object):
    """A block that may work, or raise one sentence; whatever else it raises fails with its input."""
    try:
        yield
    except SENTENCES as error:
        if not 0 < len(str(error)) < 100_000:
            raise AssertionError(f"{error!r}, of {what!r}"[:3000]) from error
        refusals.append(str(error))
    except (Exception, RecursionError) as error:
        raise AssertionError(f"{type(error).__name__}: {error}, of {what!r}"[:3000]) from error


def changed(content: Any, rng: random.Random) -> Any:
    """JSON with a value at a random place replaced, removed or added."""
    content = json.loads(json.dumps(content))
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(content)
    inside, key = rng.choice(places)
    if (kind := rng.random()) < 0.15:
        del inside[key]
    elif kind < 0.25 and isinstance(inside, dict):
        inside[rng.choice(["more", "", "__init__"])] = rng.choice(VALUES)
    else:
        inside[key] = rng.choice(VALUES)
    return content


def damaged(content: bytes, rng: random.Random, head: int = 10**9) -> bytes:
    """Bytes cut, or with some of the first replaced, removed or added."""
    made = bytearray(content)
    if rng.random() < 0.3:
        return bytes(made[: rng.randrange(len(made))])
    for _ in range(rng.choice([1, 1, 3, 20])):
        place = rng.randrange(min(head, len(made)))
        made[place : place + rng.randrange(3)] = rng.choice(
            [b"", b"\0", b"\xff", b"[", b"{", b'"', b"\n", b"9" * 30, b"[" * 5000, "\u2028".encode(), b"\x85"]
        )
    return bytes(made)


def hostile_json(content: Any, rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return damaged(json.dumps(content).encode(), rng)
    return json.dumps(changed(content, rng)).encode()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """Calibrated gates of the model in a folder."""
    folder = tmp_path_factory.mktemp("saved") / "gates"
    laws = dict.fromkeys((0, 1), ((-1.0, 0.1, 0.2),) * 2)
    calibration = Calibration("density", 0.3, 128, (16, 16), 0.0, 0.3, laws)
    gates = new_gates(model, block_size=16, q_sub_block=8, k_sub_block=8)
    save_gates(gates, folder, policy=Calibrated(calibration))
    return folder


# Damage may leave gates that were taught for less, which is said.
@pytest.mark.filterwarnings("ignore:a text of .* tokens is past the .* positions:UserWarning")
def test_folders_of_gates(model, saved, tmp_path):
    rng, refusals, right = random.Random(0), [], 0
    ids = torch.arange(64)[None]
    for number in range(250):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        file = folder / rng.choice(["config.json", "config.json", "calibration.json", "gates.safetensors"])
        before = file.read_bytes()
        if file.suffix == ".json":
            file.write_bytes(hostile_json(json.loads(before), rng))
        else:
            # Its header says where the tensors are.
            file.write_bytes(damaged(before, rng, head=600))
        with refused_or_right(refusals, file.read_bytes()[:2000]):
            gates = load_gates(folder)
            right += 1
            try:
                attach(model, gates, min_tokens=0)
                model(ids)
            finally:
                detach(model)
        shutil.rmtree(folder)
    assert right > 10
    assert len(refusals) > 120


class Canary:
    """A pickle that would make a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def published_config(**more: Any) -> dict[str, Any]:
    return {
        "base_model": "someone/tiny", "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "hidden_size": 32, "rope_theta": 10000.0,
        "seerattn_gate_block_size": 16, "seerattn_gate_hidden_size": 16,
        "seerattn_gate_type": "Qavg_Kmaxminavg", "seerattn_sparsity_method": "threshold",
        "seerattn_threshold": 0.01, **more,
    }  # fmt: skip


def test_published_folders(tmp_path):
    rng, refusals, right = random.Random(1), [], 0
    key, canary = "model.layers.{}.self_attn.attn_gate.mask_linear_k.weight", tmp_path / "canary"
    weights = {key.format(layer): torch.randn(2, 48, 16) for layer in (0, 1)}
    file, first = tmp_path / "attn_gate_weights.pth", key.format(0)
    torch.save(weights, file)
    good = file.read_bytes()
    wrong: list[Any] = [
        {**weights, "more": Canary(canary)}, {first: Canary(canary)}, Canary(canary), [weights],
        weights[first], {0: weights[first]}, {}, {k: v.to("meta") for k, v in weights.items()},
        {k: v.to(torch.int8) for k, v in weights.items()}, {k: v.to_sparse() for k, v in weights.items()},
        {k: v[:1].expand(2**40, 48, 16) for k, v in weights.items()},
    ]  # fmt: skip
    for number in range(250):
        config = published_config()
        file.write_bytes(good)
        if number < len(wrong):
            torch.save(wrong[number], file)
        elif number == len(wrong) + 3:
            with (
                zipfile.ZipFile(tmp_path / "good", "w", zipfile.ZIP_DEFLATED) as packed,
                zipfile.ZipFile(file) as plain,
            ):
                for one in plain.namelist():
                    packed.writestr(one, plain.read(one) if "data/" not in one else bytes(2**24))
            shutil.copy(tmp_path / "good", file)
        elif number < len(wrong) + 3:
            file.write_bytes(pickle.dumps(wrong[number - len(wrong)], protocol=number % 3 + 2))
        elif rng.random() < 0.4:
            file.write_bytes(damaged(good, rng))
        (tmp_path / "config.json").write_bytes(
            hostile_json(config, rng) if rng.random() < 0.7 and number > 20 else json.dumps(config).encode()
        )
        with refused_or_right(refusals, (tmp_path / "config.json").read_bytes()[:2000]):
            load_gates(tmp_path)
            right += 1
        assert not canary.exists()
    assert right > 10
    assert len(refusals) > 100


DISTILL = """model = "m"
text = ["a.txt", "b.txt"]
steps = 10
lr = 1e-3
policy = "top_k:0.1,sink_blocks=1"
objective = "kl"
[gate]
block_size = 16
k_pool = ["max", "avg"]
"""
FINETUNE = """model = "m"
text = "a.txt"
density = [0.1, 0.2]
lora = 4
rope_type = "yarn"
rope_factor = 2.0
shard = false
"""
EVAL = """lengths = [512, 1024]
densities = [0.1, 0.2]
samples = 2
[model]
name = "bundled"
[methods.gates]
gates = "bundled"
policy = "top_k:{density}"
[methods.minference]
[tasks.niah_single]
skip_below = 0.1
[tasks.mine]
task = "needle"
lengths = [512]
"""


@pytest.mark.parametrize("text", [DISTILL, FINETUNE, EVAL], ids=["distill", "finetune", "eval"])
def test_settings(text, tmp_path):
    rng, refusals, right = random.Random(2), [], 0
    file, kind = tmp_path / "a.toml", {DISTILL: Distillation, FINETUNE: Finetuning}.get(text)
    lines = text.splitlines()
    values = [
        "[]",
        "{}",
        "1e999",
        "nan",
        "-1",
        "0",
        "9" * 30,
        "true",
        '"x"',
        "[[1]]",
        "1979-05-27",
        "{a = 1}",
        "[" * 2000,
    ]
    for _ in range(250):
        changed_lines = list(lines)
        for _ in range(rng.choice([1, 1, 2])):
            line = rng.randrange(len(lines))
            name, sign, _ = lines[line].partition(" = ")
            changed_lines[line] = rng.choice(
                [f"{name}{sign}{rng.choice(values)}", f"{name}{sign}{rng.choice(values)}", ""]
            )
        content = "\n".join(changed_lines).encode()
        file.write_bytes(damaged(content, rng) if rng.random() < 0.3 else content)
        overrides = (
            [f"{rng.choice(lines).partition(' = ')[0]}={rng.choice(values)}"] if rng.random() < 0.3 else []
        )
        with refused_or_right(refusals, (file.read_bytes(), overrides)):
            read_config(file, overrides) if kind is None else build(kind, read(file, overrides))
            right += 1
    assert right > 10
    assert len(refusals) > 100


def test_policies(saved):
    rng, refusals, right = random.Random(3), [], 0
    calibration = load_gates(saved).calibration
    whole = [
        "top_k:0.1,sink_blocks=1",
        "threshold:5e-4,dense_last_rows=2",
        "token_budget:1024,local_blocks=2",
        "top_p:0.9",
        "calibrated",
    ]
    parts = [
        "",
        ":",
        ",",
        "=",
        "-",
        "inf",
        "nan",
        "1e400",
        "9" * 5000,
        "0",
        "0.0",
        "_1",
        "[/b]",
        "\u0661",
        "\0",
        "sink_blocks=",
        "top_k",
        " ",
    ]
    for _ in range(3000):
        text = rng.choice(whole)
        for _ in range(rng.choice([1, 1, 2, 4])):
            place = rng.randrange(len(text) + 1)
            text = text[:place] + rng.choice(parts) + text[place + rng.randrange(3) :]
        with refused_or_right(refusals, text):
            policy = parse(text, calibration)
            assert parse(str(policy), calibration) == policy
            policy.expected_density(100, 64)
            right += 1
    assert right > 50
    assert len(refusals) > 1000


def row(**more: Any) -> dict[str, Any]:
    return {
        "of": "0123", "method": "dense", "policy": "", "task": "needle", "metric": "share", "length": 512,
        "tokens": 500, "density_asked": None, "density": 1.0, "seed": 0, "expected": ["12"], "depths": [0.5],
        "answer": "12", "score": 1.0, "prefill_s": 0.1, "seconds": 0.2, "faults": [],
        "by_position": [[1, 2, 0.5]], **more,
    }  # fmt: skip


def test_samples_and_summaries(tmp_path):
    rng, refusals, right = random.Random(4), [], 0
    lines = b"\n".join(json.dumps(row(seed=seed)).encode() for seed in range(3)) + b"\n"
    summary = {
        "model": "m", "dtype": "float32", "text": "t", "date": "2026-11-28", "versions": {}, "rows": [{
            "task": "needle", "length": 512, "method": "dense", "policy": "", "asked": None, "density": 1.0,
            "samples": 1, "planned": 2, "metric": "share", "score": 0.5, "interval": [0.1, 0.9],
            "minus_dense": 0.1, "minus_dense_interval": [0.0, 0.2], "prefill_s": 0.1, "seconds": 0.2,
            "faults": {"empty answer": 1},
        }],
    }  # fmt: skip
    for _ in range(250):
        file = tmp_path / "samples.jsonl"
        file.write_bytes(
            damaged(lines, rng) if rng.random() < 0.5 else lines + hostile_json(row(seed=3), rng) + b"\n"
        )
        with refused_or_right(refusals, file.read_bytes()), RecordFile(tmp_path, readonly=True) as found:
            assert len(found.records) + len(found.corrupt) > 0 or not file.read_bytes().strip()
        (tmp_path / "summary.json").write_bytes(hostile_json(summary, rng))
        with refused_or_right(refusals, (tmp_path / "summary.json").read_bytes()):
            assert "<html" in page(read_results(tmp_path), None)
            right += 1
    assert right > 50
    assert len(refusals) > 100


@pytest.fixture(scope="module")
def tokenizer():
    made = bundled.AutoTokenizer.from_pretrained(bundled.TEACHER)
    made.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    return made


def test_text(tokenizer, tmp_path):
    rng, refusals, right = random.Random(5), [], 0
    rows: list[Any] = [
        {"text": "Once upon a time there was a king. " * 3},
        {"messages": [{"role": "user", "content": "a"}]},
    ]
    for _ in range(250):
        good = b"\n".join(json.dumps(rng.choice(rows), ensure_ascii=False).encode() for _ in range(3))
        file = tmp_path / rng.choice(["a.txt", "a.jsonl", "a.jsonl", "a.jsonl"])
        content = (
            damaged(good, rng) if rng.random() < 0.4 else good + b"\n" + hostile_json(rng.choice(rows), rng)
        )
        file.write_bytes(content)
        with refused_or_right(refusals, content[:2000]):
            tokens = read_tokens([file], tokenizer)
            assert tokens.dtype == np.int64
            right += 1
        with refused_or_right(refusals, content[:2000]):
            Packs(text_documents([file], tokenizer), 32, 1, 16)(0)
    assert right > 50
    assert len(refusals) > 100


def test_checkpoints(model, tmp_path):
    rng, refusals, right = random.Random(6), [], 0
    text = np.random.default_rng(0).integers(2, 64, 400)
    file = tmp_path / "checkpoint.safetensors"

    def resume() -> Distiller:
        torch.manual_seed(1)
        gates = new_gates(model, block_size=16, q_sub_block=8, k_sub_block=8)
        return Distiller(
            model, gates, TextWindows(text, 64), DistillConfig(steps=3, save_every=2), out=tmp_path
        )

    next(resume().run())
    trainer = resume()
    next(trainer.run())
    trainer.save()
    good = file.read_bytes()
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + size])
    state = json.loads(header["__metadata__"]["state"])
    for _ in range(250):
        if (kind := rng.random()) < 0.3:
            file.write_bytes(damaged(good, rng, head=size))
        elif kind < 0.7:
            metadata = {"state": hostile_json(state, rng).decode(errors="replace")}
            written = json.dumps({**header, "__metadata__": metadata}).encode()
            file.write_bytes(len(written).to_bytes(8, "little") + written + good[8 + size :])
        else:
            names = rng.sample(sorted(set(header) - {"__metadata__"}), 2)
            tensors = {name: torch.zeros(header[name]["shape"]) for name in header if name != "__metadata__"}
            tensors[names[0]] = torch.zeros(rng.choice([(), (1,), (0,), (2, 3), (1, 1, 1)]))
            del tensors[names[1]]
            save_file(tensors, file, metadata={"state": json.dumps(state)})
        with refused_or_right(refusals, file.read_bytes()[8:2000]):
            list(itertools.islice(resume().run(), 1))
            right += 1
    assert len(refusals) > 120
