"""From files or a dataset to batches and held-out windows."""

import json

import numpy as np
import pytest

from seerattention.train import Source


class Bytes:
    """A tokenizer whose tokens are bytes."""

    eos_token_id = 0
    chat_template = None

    def encode(self, text, **options):
        return list(text.encode())


@pytest.fixture
def rows(tmp_path):
    """A folder of eight documents of 49 tokens, the end included."""
    lines = [json.dumps({"text": chr(97 + i) * 48}) for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path


def read(least=16, **settings):
    return Source(**{"length": 32, **settings}).read(Bytes(), least)


def test_the_end_of_a_text_is_held_out_and_windows_come_from_the_rest(rows):
    text = read(text=(str(rows),), sequences=3, seed=1)
    assert str(text) == "392 tokens; held out: the end of the text, not trained on"
    assert [len(window) for window in text.heldout] == [32]
    assert bytes(text.heldout[0].tolist()) == b"h" * 31 + b"\0"
    assert text.batches(0).shape == (3, 32)
    assert not any((text.batches(step) == ord("h")).all(-1).any() for step in range(20))


def test_packed_files_keep_their_documents_and_given_text_is_held_out(rows, tmp_path):
    (tmp_path / "held.txt").write_text("z" * 100)
    text = read(
        text=(str(rows / "rows.jsonl"),), packing=True, heldout=(str(tmp_path / "held.txt"),), length=49
    )
    assert text.held == "given"
    assert bytes(np.concatenate(text.heldout).tolist()) == b"z" * 98
    assert [text.batches(step).lengths for step in range(2)] == [((49,),), ((49,),)]
    assert bytes(text.batches(1).tokens[0].tolist()) == b"b" * 48 + b"\0"


def test_the_first_documents_of_a_dataset_are_held_out(rows):
    text = read(dataset=str(rows))
    assert text.held == "the first 3 documents, not trained on"
    assert bytes(np.concatenate(text.heldout).tolist())[:49] == b"a" * 48 + b"\0"
    assert text.batches(0).tokens[0][0] == ord("d")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "either text or dataset"),
        ({"text": ("a",), "dataset": "b"}, "either text or dataset"),
        ({"dataset": "b", "packing": False}, "always packed"),
        ({"text": ("rows.jsonl",), "length": 8}, "length 8 is below 4 blocks, 16 tokens"),
        (
            {"text": ("rows.jsonl",), "length": 200},
            "one sequence of 200 to train on and one held out",
        ),
        ({"text": ("rows.jsonl",), "heldout": ("short.txt",)}, "held-out text has 4 tokens, fewer than one"),
    ],
)
def test_what_cannot_be_read_is_refused(rows, monkeypatch, settings, words):
    monkeypatch.chdir(rows)
    (rows / "short.txt").write_text("abc")
    with pytest.raises(ValueError, match=words):
        read(**settings)
