"""Two tokenizers: the bundled teacher's, and one of bytes that begins every text with BOS."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from seerattention.evals.tasks import Source
from seerattention.measure import bundled


def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, **{c: i + 2 for i, c in enumerate(letters)}}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def source_of(tokenizer, documents: int = 1, chat: bool = False) -> Source:
    """The bundled text, cut into documents."""
    text = bundled.TEXT.read_text(encoding="utf-8")[60_000:]
    tokens = np.array(tokenizer.encode(text, add_special_tokens=False))
    return Source(tokenizer, np.array_split(tokens, documents), chat)


@pytest.fixture(scope="session")
def teacher_source() -> Source:
    return source_of(AutoTokenizer.from_pretrained(bundled.TEACHER))


@pytest.fixture(scope="session")
def byte_source() -> Source:
    return source_of(byte_tokenizer())


@pytest.fixture(params=["teacher", "bytes"])
def source(request, teacher_source, byte_source) -> Source:
    return teacher_source if request.param == "teacher" else byte_source
