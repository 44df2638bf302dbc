"""Prompts that processes share, line by line of the table of features."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from seerattention.hosts import transformers as host
from tests.hosts.transformers.features import attached, lines, prove


@contextmanager
def one_of_a_mesh(tmp_path):
    """Be the only process of a mesh."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def filled(tiny, tmp_path, model, then):
    """Give a prompt to a cache that processes share, and go on."""
    with one_of_a_mesh(tmp_path) as mesh:
        cache = host.ContextParallelCache(model, mesh)
        ids = tiny.tokens(2, 70)
        logits = host.prefill(model, ids, cache).logits
        return then(ids, cache), logits


def context_parallel(tiny, tmp_path):
    model = attached(tiny)
    host.set_policy(model, decode="token_budget:48")
    ids = tiny.tokens(2, 70)
    following = {"max_new_tokens": 20, "do_sample": False}
    expected = model.generate(ids, **following)

    def generate(ids, cache):
        more = torch.cat([ids, expected[:, 70:71]], 1)
        return model.generate(more, max_new_tokens=19, do_sample=False, **host.cache_argument(model, cache))

    answer, logits = filled(tiny, tmp_path, model, generate)
    assert torch.equal(logits.argmax(-1), expected[:, 70:71])
    assert torch.equal(answer, expected)


def windows_shared(tiny, tmp_path):
    model = attached(tiny, kind="gemma2")
    filled(tiny, tmp_path, model, None)


def rope_shared(tiny, tmp_path):
    model = attached(tiny, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    filled(tiny, tmp_path, model, None)


def heads_shared_too(tiny, tmp_path):
    model = attached(tiny)
    # As transformers leaves one that it spread; tests of context parallelism spread one.
    model.config.distributed_config, model._device_mesh = SimpleNamespace(tp_size=2), object()
    filled(tiny, tmp_path, model, None)


def layers_shared_too(tiny, tmp_path):
    model = tiny.make()
    host.attach(model, tiny.gates_for(model, layers_per_gate=2), "top_k:0.5")
    filled(tiny, tmp_path, model, None)


def second_prompt(tiny, tmp_path):
    model = attached(tiny)
    filled(tiny, tmp_path, model, lambda ids, cache: host.prefill(model, ids, cache))


def beams_shared(tiny, tmp_path):
    model = attached(tiny)
    filled(
        tiny,
        tmp_path,
        model,
        lambda ids, cache: model.generate(
            torch.cat([ids, ids[:, :1]], 1),
            num_beams=2,
            max_new_tokens=4,
            do_sample=False,
            **host.cache_argument(model, cache),
        ),
    )


def gradient_shared(tiny, tmp_path):
    model = attached(tiny)
    filled(
        tiny,
        tmp_path,
        model,
        lambda ids, cache: model(ids[:, :1], **host.cache_argument(model, cache)),
    )


KIND = "shared prompt"
CHECKS = {
    "context parallelism": context_parallel,
    "sliding windows": windows_shared,
    "RoPE of type dynamic or longrope": rope_shared,
    "beside tensor parallelism": heads_shared_too,
    "layers that share a choice": layers_shared_too,
    "a second long prompt": second_prompt,
    "caches that are copied, cropped or reordered, as by beams": beams_shared,
    "with a gradient": gradient_shared,
}


@lines(KIND)
def test_the_line_is_true(tiny, tmp_path, feature):
    prove(feature, CHECKS, tiny, tmp_path)
