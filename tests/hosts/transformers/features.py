"""What checks of the table of features share: attached models, and a test for every line."""

import pytest
import torch
from transformers.cache_utils import QuantizedLayer
from transformers.distributed import DistributedConfig

from seerattention.hosts import transformers as host
from seerattention.hosts.transformers.support import features

POLICY = "threshold:0.2"


def attached(tiny, policy=POLICY, **changes):
    model = tiny.make(**changes)
    return host.attach(model, tiny.gates_for(model), policy, min_tokens=0)


def generated(model, ids, cache=None, **inputs):
    if cache is not None:
        inputs |= host.cache_argument(model, cache)
    return model.generate(ids, **{"max_new_tokens": 12, "do_sample": False, **inputs})


def assert_sparse(model):
    assert host.usage(model)["sparse"] > 0


class EightBits(QuantizedLayer):
    """Gives keys back as it stored them, in steps of a 127th of their greatest value."""

    def _quantize(self, tensor, axis):
        step = tensor.abs().amax(-1, keepdim=True) / 127
        return (tensor / step).round(), step

    def _dequantize(self, stored):
        return stored[0] * stored[1]


def decoding(tiny, decode="token_budget:32", **options):
    """A model that decodes sparsely; `test_decode.py` and its neighbours compare what it gives."""
    model = tiny.make()
    gates = tiny.gates_for(model, phase="both")
    return host.attach(model, gates, prefill="dense", decode=decode, min_tokens=0, **options)


def adapted(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    targets = ["q_proj", "k_proj", "v_proj"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


def spread(tiny, processes):
    """A model as transformers marks one that it spread; a test has one process."""
    model = tiny.make()
    model.config.distributed_config = DistributedConfig(tp_size=processes)
    model._device_mesh = "a mesh"
    return model


def lines(kind):
    """A test for every line of a kind, which takes it as ``feature``."""
    each = [feature for feature in features() if feature.kind == kind]
    quiet = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")
    named = pytest.mark.parametrize("feature", each, ids=lambda feature: f"{feature.kind}: {feature.name}")
    return lambda test: quiet(named(test))


def prove(feature, checks, tiny, tmp_path):
    """A line's check passes, or ends in the reason that the line gives."""
    check = checks[feature.name]
    if feature.reason is None:
        check(tiny, tmp_path)
        return
    # Every refusal is of one of these kinds; torch's own, for whole graphs, is a RuntimeError.
    with pytest.raises((ValueError, NotImplementedError, RuntimeError)) as refusal:
        check(tiny, tmp_path)
    assert feature.reason in str(refusal.value)
