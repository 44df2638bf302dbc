"""Training of attached models and of gates, line by line of the table of features."""

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from seerattention.hosts import transformers as host
from seerattention.measure.maps import record_layers
from seerattention.train import Distiller
from tests.hosts.transformers.features import adapted, attached, lines, prove, spread


def learning_from_parts(tiny, tmp_path):
    model, gates = spread(tiny, 2), tiny.gates_for(tiny.make())
    with pytest.raises(NotImplementedError, match="gates learn from all heads"):
        record_layers(model, gates, [], lambda *call: None)
    Distiller(model, gates, lambda step: tiny.tokens(2, 64).numpy())


def gradients(tiny, tmp_path, checkpointing=False):
    """Adapters are trained through sparse attention; with everything read as through dense attention."""
    ids, found = tiny.tokens(1, 64), {}
    for policy in (None, "top_k:1", "top_k:0.8"):
        model = adapted(tiny.make())
        if policy:
            gates = tiny.gates_for(tiny.make())
            host.attach(model, gates, policy, min_tokens=0)
        if checkpointing:
            model.train()
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids, use_cache=False).loss.backward()
        lora = {n: p.grad for n, p in model.named_parameters() if "lora" in n}
        assert all(g is not None and g.isfinite().all() and g.any() for g in lora.values())
        found[policy] = torch.cat([g.flatten() for g in lora.values()])
    tiny.assert_as_close(found["top_k:1"], found[None], found[None].double())
    assert not torch.equal(found["top_k:0.8"], found[None])


def checkpointing(tiny, tmp_path):
    gradients(tiny, tmp_path, checkpointing=True)


def distributed(tiny, tmp_path):
    """One process is enough to see who waits for a gradient that never comes."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    def sharded(model):
        mesh = init_device_mesh("cpu", (1,))
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
        return model

    def steps(model):
        """Three steps, of which the third shows what the first left."""
        for p in model.parameters():
            p.grad = None
        losses = []
        for _ in range(3):
            losses.append(model(ids, labels=ids, use_cache=False).loss)
            losses[-1].backward()
        return torch.stack(losses)

    ids, options = tiny.tokens(2, 64), {"policy": "top_k:0.5", "min_tokens": 0}
    expected = steps(host.attach(tiny.make(), tiny.gates_for(tiny.make()), **options))
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    try:
        for wrap in (DistributedDataParallel, sharded):
            for wrapped_first in (False, True):
                model, gates = tiny.make(), tiny.gates_for(tiny.make())
                if wrapped_first:
                    model = host.attach(wrap(model), gates, **options)
                else:
                    model = wrap(host.attach(model, gates, **options))
                torch.testing.assert_close(steps(model), expected)
                assert host.attached(model)
                assert host.BaseInfo.of(model).num_layers == 2
                assert host.usage(model) == {"sparse": 6}
                assert not [n for n, p in model.named_parameters() if "attn_gate" in n and p.requires_grad]
                host.set_policy(model, "top_k:1")
                with host.dense(model):
                    steps(model)
                assert host.usage(model) == {"sparse": 6}
                assert host.detach(model) is model
                assert not host.attached(model)
                # Whoever teaches gates gets them as they came.
                assert all(p.requires_grad for p in gates.parameters())
                steps(model)
    finally:
        dist.destroy_process_group()


def dropout(tiny, tmp_path):
    attached(tiny, attention_dropout=0.1).train()(tiny.tokens(1, 64))


KIND = "training"
CHECKS = {
    "the model": gradients,
    "activation checkpointing": checkpointing,
    "DDP and FSDP2, before or after attaching": distributed,
    "gates, and calibrating them, under tensor parallelism": learning_from_parts,
    "attention dropout": dropout,
}


@lines(KIND)
def test_the_line_is_true(tiny, tmp_path, feature):
    prove(feature, CHECKS, tiny, tmp_path)
