"""What vLLM's host refuses, each with its reason."""

from types import SimpleNamespace

import pytest
import torch

from seerattention.hosts.vllm import support
from seerattention.hosts.vllm.settings import Settings

MADE, KEPT = Settings("here", summaries="made"), Settings("here")


def config(cache_dtype="auto", use_mla=False, mrope=False, rope=None, context=1, second=False, **more):
    text = SimpleNamespace(
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 1e4},
        is_causal=more.get("causal", True),
    )
    model = {"dtype": torch.bfloat16, "attn_type": more.get("attends", "decoder")}
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=text, use_mla=use_mla, uses_mrope=mrope, **model),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        parallel_config=SimpleNamespace(decode_context_parallel_size=context),
        scheduler_config=SimpleNamespace(scheduler_cls=more.get("scheduler")),
        use_v2_model_runner=second,
        kv_transfer_config=more.get("connector"),
        speculative_config=more.get("guesses"),
    )


@pytest.mark.parametrize("settings", [MADE, KEPT])
def test_nothing_is_refused(settings):
    for version in support.VERSIONS:
        for dtype in ("auto", "bfloat16"):
            assert support.refusals(config(dtype), settings, version, "cpu") == []


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"cache_dtype": "fp8_e4m3"}, support.PRECISION.format(dtype="fp8_e4m3")),
        ({"cache_dtype": "float16"}, support.PRECISION.format(dtype="float16")),
        ({"attends": "encoder_only"}, support.BIDIRECTIONAL),
        ({"causal": False}, support.BIDIRECTIONAL),
        ({"use_mla": True}, support.MLA),
        ({"context": 2}, support.CONTEXT),
        ({"mrope": True}, support.MROPE),
        ({"rope": {"rope_type": "default", "mrope_section": [8, 12, 12]}}, support.MROPE),
        ({"rope": {"rope_type": "longrope"}}, support.LENGTHS.format(kind="longrope")),
        ({"rope": {"rope_type": "dynamic"}}, support.LENGTHS.format(kind="dynamic")),
        ({"second": True}, support.RUNNER),
    ],
)
def test_models_and_options(given, reason):
    assert support.refusals(config(**given), MADE, support.VERSIONS[0], "cpu") == [reason]


@pytest.mark.parametrize(
    ("option", "reason"), [("connector", support.CONNECTOR), ("guesses", support.GUESSES)]
)
def test_what_kept_summaries_cannot_follow(option, reason):
    given = config(**{option: object()})
    assert support.refusals(given, KEPT, support.VERSIONS[0], "cpu") == [reason]
    assert support.refusals(given, MADE, support.VERSIONS[0], "cpu") == []


def test_two_schedulers():
    given = config(scheduler="somebody.Scheduler")
    asked = Settings("here", aligned=True)
    assert support.refusals(given, asked, support.VERSIONS[0], "cpu") == [support.SCHEDULER]
    assert support.refusals(given, KEPT, support.VERSIONS[0], "cpu") == []


def test_other_versions_and_platforms():
    wrong, gpu = support.refusals(config(), MADE, "0.33.0", "cuda")
    assert wrong == "seerattention serves in vLLM 0.32.0, and this is 0.33.0; install one of these"
    assert "this platform is cuda" in gpu
