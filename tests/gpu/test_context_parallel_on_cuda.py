"""Two GPUs that share a prompt, over NCCL, give what one gives."""

import os

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from seerattention.hosts import transformers as host

LENGTHS = [5 * 512 + 37, 700]
POLICIES = {"prefill": "top_k:0.3,sink_blocks=1", "decode": "token_budget:512"}
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def made(dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=512, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=8192,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to("cuda", dtype).eval()
    model.generation_config.eos_token_id = None
    torch.manual_seed(1)
    return model, host.new_gates(model).to(dtype)


@torch.no_grad()
def answers(dtype, piece):
    """Logits of what follows two prompts."""
    model, gates = made(dtype)
    host.attach(model, gates, **POLICIES, min_tokens=0)
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64, device="cuda")
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        generator = torch.Generator().manual_seed(row)
        ids[row, -length:] = torch.randint(3, 128, (length,), generator=generator)
        mask[row, -length:] = 1
    # The same tokens follow everywhere, so that one near tie does not change all after it.
    tokens = torch.arange(3, 9, device="cuda")
    found = []
    if dist.is_initialized():
        cache = host.ContextParallelCache(model, init_device_mesh("cuda", (2,)))
        found.append(host.prefill(model, ids, cache, attention_mask=mask, piece_tokens=piece).logits)
        for step, token in enumerate(tokens):
            places = torch.tensor(LENGTHS, device="cuda")[:, None] + step
            given = host.cache_argument(model, cache)
            found.append(model(token.expand(2, 1), position_ids=places, **given).logits)
        return torch.cat(found, 1).float().cpu()
    rows = []
    for row, length in enumerate(LENGTHS):
        cache = DynamicCache()
        own = [host.prefill(model, ids[row : row + 1, -length:], cache, piece_tokens=8192).logits[:, -1:]]
        own += [model(token.expand(1, 1), **host.cache_argument(model, cache)).logits for token in tokens]
        rows.append(torch.cat(own, 1))
    return torch.cat(rows).float().cpu()


def one(rank, meet, dtype, piece):
    torch.cuda.set_device(rank)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("nccl", init_method=f"file://{meet}", rank=rank, world_size=2)
    torch.save(answers(dtype, piece), f"{meet}.{rank}")
    dist.destroy_process_group()


@needs_two
@pytest.mark.parametrize("piece", [8192, 512], ids=["whole", "pieces"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_gpus_answer_as_one(tmp_path, dtype, piece):
    multiprocessing.spawn(one, (str(tmp_path / "meet"), dtype, piece), nprocs=2)
    first, second = (torch.load(tmp_path / f"meet.{rank}") for rank in range(2))
    assert torch.equal(first, second)
    expected, gold = answers(dtype, 8192), answers(torch.float64, 8192)
    error = (expected - gold).abs().max()
    assert (first - gold).abs().max() <= 2 * error + 1e-5 * gold.abs().max()
