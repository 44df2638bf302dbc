"""What cannot be served ends the start in one sentence, before a model is loaded."""

import json
import shutil

import pytest
from vllm import LLM

from seerattention.hosts.vllm import plugin, support
from seerattention.measure import bundled
from tests.vllm.engines import settings

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


def start(given, model=bundled.TEACHER, **options):
    return LLM(str(model), additional_config={"seerattention": given}, enforce_eager=True, **options)


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch):
    """An engine that starts after all would take seconds."""

    def begin(*args, **kwargs):
        pytest.fail("the engine was started")

    monkeypatch.setattr("vllm.v1.engine.llm_engine.LLMEngine.__init__", begin)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (settings(polcy="top_k:0.1"), ValueError, "unknown 'polcy' .did you mean policy"),
        ({"policy": "top_k:0.1"}, ValueError, "gates"),
        ("gates", ValueError, "must be settings, e.g."),
        (settings(gates="no/such/folder"), FileNotFoundError, "no/such/folder"),
        (settings("top_kk:0.1"), ValueError, "top_kk"),
        (settings("dense"), ValueError, "nothing is left to choose"),
        (settings(min_tokens=-1), ValueError, "min_tokens must be a whole number >= 0"),
        (settings(backend="cuda"), ValueError, "backend"),
        (settings(summaries="sometimes"), ValueError, "summaries"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings(given, error, words):
    with pytest.raises(error, match=words):
        start(given)


def test_gates_of_another_model(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(bundled.TEACHER, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    with pytest.raises(ValueError, match="num_layers is 7, not 8"):
        start(settings(), model)


def test_gates_of_other_weights(tmp_path):
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(bundled.TEACHER, model)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.3.self_attn.q_proj.weight"] *= 1.5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="attention weights differ"):
        start(settings(), model)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype is fp8"),
        ({"kv_cache_dtype": "bfloat16", "dtype": "float32"}, "kv_cache_dtype is bfloat16"),
        ({"runner": "pooling", "hf_overrides": {"is_causal": False}}, "see what comes after"),
        (
            {"hf_overrides": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}},
            "dynamic",
        ),
    ],
)
def test_options(options, words):
    with pytest.raises(NotImplementedError, match=words):
        start(settings(), **options)


@pytest.mark.parametrize("page", [32, 96])
def test_pages_that_hold_no_whole_blocks(page):
    with pytest.raises(NotImplementedError, match=f"pages of {page} tokens do not hold whole blocks of 64"):
        start(settings(summaries="kept"), block_size=page)


def test_another_version(monkeypatch):
    monkeypatch.setattr(plugin, "refusals", lambda *args: support.refusals(*args[:2], "0.33.0", "cpu"))
    with pytest.raises(NotImplementedError, match=r"serves in vLLM 0.32.0, and this is 0.33.0"):
        start(settings())
