"""What tests of engines share: the bundled model in vLLM and attached, and what every row of blocks reads."""

import gc
from contextlib import contextmanager

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.inputs import TokensPrompt

from seerattention import attach, load_gates
from seerattention.hosts.transformers.attach import prompt_of
from seerattention.hosts.vllm.served import served_in
from seerattention.measure import bundled

POLICY = "top_k:0.3"
NEW_TOKENS = 12
#: Tokens of prompts: around a block and a page, and lengths that no block divides.
LENGTHS = (1, 2, 63, 64, 65, 129, 777, 1500)


def texts(*lengths, begin=5000):
    """Prompts out of the bundled text, one behind the other."""
    text, found = bundled.text_tokens(bundled.load_teacher()[1])[1], []
    for length in lengths:
        found.append(text[begin : begin + length].tolist())
        begin += length
    return found


class Chosen(dict):
    """An observer: which blocks every head reads in a row, by layer, prompt tokens and the row's position."""

    def __call__(self, layer, call, selection):
        tokens, mask = call.prompt_tokens or call.rows.num_keys, selection.to_mask()[0]
        for row in range(selection.shape[2]):
            position = call.rows.first + row * selection.block_size[0]
            self[layer, tokens, position] = [heads.nonzero().flatten().tolist() for heads in mask[:, row]]

    def taken(self):
        """Return what was seen, and forget it."""
        seen = dict(self)
        self.clear()
        return seen


def settings(policy=POLICY, **more):
    """What an engine is told."""
    return {"gates": str(bundled.GATES), "policy": policy, "min_tokens": 0, **more}


@contextmanager
def engine(given=None, *, model=bundled.TEACHER, **options):
    """A model in vLLM with these settings, None for none; options are vLLM's."""
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 4096, **options}
    options.setdefault("num_gpu_blocks_override", 8192 // options.setdefault("block_size", 128))
    extra = {} if given is None else {"additional_config": {"seerattention": given}}
    llm = LLM(str(model), disable_log_stats=True, **extra, **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def served_by(llm):
    """What serves an engine's layers."""
    return served_in(llm.llm_engine.vllm_config)


def watched(llm):
    """What an engine's layers choose from now on."""
    seen = served_by(llm).observe = Chosen()
    return seen


def answers(llm, prompts, tokens=NEW_TOKENS):
    """The tokens that greedy decoding adds to each of some prompts, served together."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    given = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    return [list(out.outputs[0].token_ids) for out in llm.generate(given, params, use_tqdm=False)]


class Alone:
    """The attached model, given prompts one at a time.

    Args:
        policy: Which blocks it reads; None for dense attention.
        dtype: Of the weights.
    """

    def __init__(self, policy=POLICY, dtype=torch.float32):
        self.model, self.seen = bundled.load_teacher(dtype)[0], Chosen()
        if policy is not None:
            attach(self.model, load_gates(bundled.GATES), policy, min_tokens=0, observe=self.seen)

    def answer(self, prompt, tokens=NEW_TOKENS):
        """The tokens that greedy decoding adds."""
        ids = torch.tensor([prompt])
        out = self.model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None)
        return out[0, len(prompt) :].tolist()

    def goes_on(self, cache, ids, pieces, tokens=NEW_TOKENS):
        """The tokens that it adds to a prompt of which a cache holds the beginning, the rest given in pieces.

        Args:
            cache: The KV cache.
            ids: The whole prompt.
            pieces: Where each piece begins and ends.
            tokens: How many to add.
        """
        with torch.inference_mode(), prompt_of(self.model, len(ids)):
            for begin, end in pieces:
                out = self.model(torch.tensor([ids[begin:end]]), past_key_values=cache)
        added = [int(out.logits[0, -1].argmax())]
        with torch.inference_mode():
            while len(added) < tokens:
                out = self.model(torch.tensor([added[-1:]]), past_key_values=cache)
                added.append(int(out.logits[0, -1].argmax()))
        return added

    def answers(self, prompts):
        """The same of several prompts, and what they choose."""
        self.seen.clear()
        return [self.answer(prompt) for prompt in prompts], self.seen.taken()


def assert_as_alone(llm, prompts, policy=POLICY):
    """Compare answers and all that is chosen with the attached model's."""
    expected, rows = Alone(policy).answers(prompts)
    seen = watched(llm)
    assert answers(llm, prompts) == expected
    assert seen.taken() == rows


def differing(llm, prompts, policy=POLICY):
    """How many rows of blocks read others than in the attached model."""
    _, rows = Alone(policy).answers(prompts)
    seen = watched(llm)
    answers(llm, prompts, 1)
    return sum(seen.get(key) != row for key, row in rows.items())
