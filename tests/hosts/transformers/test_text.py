"""Long texts are tokenised in pieces, with the tokens of the whole."""

import logging

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from seerattention.hosts.transformers import text as module
from seerattention.hosts.transformers.text import encoded
from seerattention.measure import bundled

NOVEL = bundled.TEXT.read_text(encoding="utf-8")[:60_000]


def trained(model, trainer, pre=None, normalizer=None):
    made = Tokenizer(model)
    made.pre_tokenizer = pre
    made.normalizer = normalizer
    made.train_from_iterator(NOVEL.splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=512)


@pytest.fixture(scope="module")
def tokenizers():
    """One of every kind that models have."""
    settings = {"vocab_size": 800, "show_progress": False}
    marked = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    whole = Tokenizer(models.BPE(unk_token="?"))
    whole.pre_tokenizer = pre_tokenizers.Metaspace()
    whole.train_from_iterator(NOVEL.splitlines(), trainers.BpeTrainer(special_tokens=["?"], **settings))
    # As Llama 2's: no words, merges go over the whole text, which begins with a space.
    whole.pre_tokenizer, whole.normalizer = None, marked
    return {
        "byte level": trained(models.BPE(), trainers.BpeTrainer(**settings), pre_tokenizers.ByteLevel()),
        "no words": PreTrainedTokenizerFast(tokenizer_object=whole, model_max_length=512),
        "unigram": trained(
            models.Unigram(),
            trainers.UnigramTrainer(unk_token="?", special_tokens=["?"], **settings),
            pre_tokenizers.Metaspace(),
        ),
        "word pieces": trained(
            models.WordPiece(unk_token="?"),
            trainers.WordPieceTrainer(special_tokens=["?"], **settings),
            pre_tokenizers.BertPreTokenizer(),
            normalizers.BertNormalizer(),
        ),
    }


@pytest.mark.parametrize("way", ["byte level", "no words", "unigram", "word pieces"])
@pytest.mark.parametrize("piece", [1000, 8191])
def test_pieces_have_the_tokens_of_the_whole(tokenizers, way, piece, monkeypatch):
    tokenizer, sizes = tokenizers[way], []
    whole = tokenizer.encode(NOVEL, add_special_tokens=False, verbose=False)
    monkeypatch.setattr(module, "PIECE", piece)
    found = encoded(NOVEL, tokenizer, sizes.append)
    assert np.array_equal(found, whole)
    assert found.dtype == np.int64
    assert sum(sizes) == len(NOVEL.encode())
    assert len(sizes) > 60_000 // (piece + module.PLACES)


def test_no_tokenizer_gets_a_whole_long_text(monkeypatch):
    seen = []

    class Bytes:
        def encode(self, text, **options):
            seen.append(len(text))
            return list(text.encode())

    monkeypatch.setattr(module, "PIECE", 1000)
    assert encoded(NOVEL, Bytes()).tolist() == list(NOVEL.encode())
    assert max(seen) <= 1000 + module.AROUND + module.PLACES


def test_a_text_without_a_place_to_part_it_is_parted_anyway(monkeypatch):
    class Runs:
        """A token is a run of letters and its length."""

        def encode(self, text, **options):
            return [len(text)] if text else []

    monkeypatch.setattr(module, "PIECE", 1000)
    assert encoded("a" * 2500, Runs()).tolist() == [1000, 1000, 500]
    assert encoded("", Runs()).tolist() == []


def test_no_warning_of_texts_longer_than_the_model_reads(tokenizers, caplog):
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        assert len(encoded(NOVEL[:5000], tokenizers["byte level"])) > 512
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records
