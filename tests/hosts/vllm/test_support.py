"""What vLLM's host refuses, each with its reason."""

from enum import Enum
from types import SimpleNamespace

import pytest
import torch

from seerattention.hosts.vllm import support
from seerattention.hosts.vllm.settings import Settings

MADE, KEPT = Settings("here", summaries="made"), Settings("here")
CPU = (support.VERSIONS["cpu"][0], "cpu")
CUDA = (support.VERSIONS["cuda"][0], "cuda")
EVERYWHERE = [(version, name) for name, versions in support.VERSIONS.items() for version in versions]


class Graphs(Enum):
    """vLLM's modes: of batches that only decode, and of those with prompts."""

    NONE = 0
    PIECEWISE = 1
    FULL = 2
    FULL_DECODE_ONLY = (FULL, NONE)
    FULL_AND_PIECEWISE = (FULL, PIECEWISE)

    def mixed_mode(self):
        return Graphs(self.value[1]) if isinstance(self.value, tuple) else self


def config(cache_dtype="auto", use_mla=False, mrope=False, rope=None, context=1, second=False, **more):
    text = SimpleNamespace(
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 1e4},
        is_causal=more.get("causal", True),
    )
    model = {"dtype": torch.bfloat16, "attn_type": more.get("attends", "decoder")}
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=text, use_mla=use_mla, uses_mrope=mrope, **model),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=context, use_ubatching=more.get("ubatches", False)
        ),
        attention_config=SimpleNamespace(backend=more.get("attention")),
        compilation_config=SimpleNamespace(cudagraph_mode=more.get("graphs", Graphs.NONE)),
        scheduler_config=SimpleNamespace(scheduler_cls=more.get("scheduler")),
        use_v2_model_runner=second,
        kv_transfer_config=more.get("connector"),
        speculative_config=more.get("guesses"),
    )


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("graphs", [mode for mode in Graphs if mode is not Graphs.FULL])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_nothing_is_refused(where, graphs, dtype):
    assert support.refusals(config(dtype, graphs=graphs), MADE, *where) == []


def test_summaries_are_kept_where_vllm_plans_their_pages():
    assert support.refusals(config(), KEPT, *CPU) == []
    (reason,) = support.refusals(config(), KEPT, *CUDA)
    assert reason == support.UNPLANNED.format(version="0.26.0")


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
        ({"ubatches": True}, support.UBATCHES),
        ({"graphs": Graphs.FULL}, support.GRAPHS.format(mode="FULL")),
        ({"second": True}, support.RUNNER),
    ],
)
@pytest.mark.parametrize("where", EVERYWHERE)
def test_models_and_options(where, given, reason):
    assert support.refusals(config(**given), MADE, *where) == [reason]


@pytest.mark.parametrize(
    ("option", "reason"), [("connector", support.CONNECTOR), ("guesses", support.GUESSES)]
)
def test_what_kept_summaries_cannot_follow(option, reason):
    given = config(**{option: object()})
    assert support.refusals(given, KEPT, *CPU) == [reason]
    assert support.refusals(given, MADE, *CPU) == []


def test_two_schedulers():
    given = config(scheduler="somebody.Scheduler")
    asked = Settings("here", aligned=True)
    assert support.refusals(given, asked, *CPU) == [support.SCHEDULER]
    assert support.refusals(given, KEPT, *CPU) == []


def test_other_versions_and_platforms():
    (wrong,) = support.refusals(config(), MADE, "0.33.0", "cpu")
    assert wrong == "on cpu seerattention serves in vLLM 0.32.0, and this is 0.33.0; install one of these"
    (wrong,) = support.refusals(config(), MADE, "0.32.0", "cuda")
    assert wrong == "on cuda seerattention serves in vLLM 0.26.0, and this is 0.32.0; install one of these"
    (wrong,) = support.refusals(config(), MADE, "0.26.0", "xpu")
    assert wrong == "seerattention serves in vLLM on cpu and cuda, and this platform is xpu"


@pytest.mark.parametrize("name", ["FLASH_ATTN", "TRITON_ATTN", "FLASHINFER"])
def test_backends_that_are_asked_for(name):
    given = config(attention=SimpleNamespace(name=name))
    # On the CPU vLLM takes its own whatever is asked for.
    assert support.refusals(given, MADE, *CPU) == []
    expected = support.ATTENTION.format(asked=name, known="FLASH_ATTN and TRITON_ATTN")
    assert support.refusals(given, MADE, *CUDA) == ([] if name in support.BACKENDS["cuda"] else [expected])
