from __future__ import annotations

import re

import numpy as np
import pytest

from seerattention.measure.needle import NeedleDocument, NeedleTask


class Words:
    """A tokenizer of words with their leading space, single digits and signs."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        pieces = re.findall(r"\d| ?[^\W\d]+|\s|[^\w\s]", text)
        assert "".join(pieces) == text
        for piece in pieces:
            if piece not in self.words:
                self.words.append(piece)
        return [self.words.index(piece) for piece in pieces]

    def decode(self, tokens: np.ndarray) -> str:
        return "".join(self.words[t] for t in tokens)


TOKENIZER = Words()
HAYSTACK = np.array(TOKENIZER.encode(" the quick fox and a lazy dog went home,\n" * 500))
TASK = NeedleTask(TOKENIZER, HAYSTACK)


@pytest.mark.parametrize("length", [300, 1000, 4000])
@pytest.mark.parametrize("questions", ["end", "spread"])
@pytest.mark.parametrize("seed", range(5))
def test_document(length: int, questions: str, seed: int) -> None:
    document = TASK.make(length, seed, questions=questions)  # type: ignore[arg-type]
    assert document.tokens.shape == (length,)
    assert document.tokens.dtype == np.int64
    text = TOKENIZER.decode(document.tokens)
    assert len(set(document.keys)) == len(document.answers) == 8
    end = 0
    for (start, stop), key, value in zip(document.answers, document.keys, document.values, strict=True):
        assert start > end
        end = stop
        assert TOKENIZER.decode(document.tokens[start:stop]) == value
        assert re.fullmatch(r"\d{5}", value)
        needle, question = f"\nThe number of the {key} is {value}.\n", f"\nThe {key}? {value}\n"
        assert text.count(needle) == text.count(question) == 1
        assert text.index(needle) < text.index(question)
        before = TOKENIZER.decode(document.tokens[:start])
        assert before.endswith(f"\nThe {key}? ")
    if questions == "end":
        tail = "".join(f"\nThe {k}? {v}\n" for k, v in zip(document.keys, document.values, strict=True))
        assert text.endswith(tail)
    else:
        # Spread over the second half of the text, which begins behind all needles.
        assert text.index("?") > text.rindex(" is ")
        assert document.answers[-1][1] - document.answers[0][0] > length // 8


@pytest.mark.parametrize("seed", range(3))
def test_the_rest_is_a_window_of_the_haystack(seed: int) -> None:
    text = TOKENIZER.decode(TASK.make(700, seed).tokens)
    text = re.sub(r"\nThe number of the [a-z ]+ is \d{5}\.\n|\nThe [a-z ]+\? \d{5}\n", "", text)
    assert len(text) > 500
    assert text in TOKENIZER.decode(HAYSTACK)


def test_a_document_follows_from_its_seed() -> None:
    first, again, other = (TASK.make(400, seed) for seed in (7, 7, 8))
    assert np.array_equal(first.tokens, again.tokens)
    assert first.answers == again.answers
    assert not np.array_equal(first.tokens, other.tokens)


def test_needles_lie_anywhere() -> None:
    where = [
        TOKENIZER.decode(TASK.make(2000, seed, num_needles=1).tokens).index("The number")
        for seed in range(60)
    ]
    assert min(where) < 0.1 * max(where)
    assert 0.3 < np.mean(where) / max(where) < 0.7


def test_predictions_are_counted_by_whole_answers() -> None:
    document = TASK.make(500, 0)
    where = document.query_positions
    assert where.shape == (40,)
    right = document.tokens[where + 1]
    assert TOKENIZER.decode(right) == "".join(document.values)
    assert document.correct(right) == 8
    one_digit = right.copy()
    one_digit[12] += 1
    assert document.correct(one_digit) == 7
    two_of_one = one_digit.copy()
    two_of_one[13] += 1
    assert document.correct(two_of_one) == 7
    assert document.correct(right + 1) == 0


def test_answers_of_different_lengths() -> None:
    document = NeedleDocument(
        np.array([5, 1, 2, 6, 3, 7, 4, 8, 9]), ((1, 3), (4, 5), (6, 9)), ("",) * 3, ("",) * 3
    )
    assert document.query_positions.tolist() == [0, 1, 3, 5, 6, 7]
    assert document.correct(np.array([1, 2, 3, 4, 8, 9])) == 3
    assert document.correct(np.array([1, 0, 3, 4, 8, 0])) == 1


@pytest.mark.parametrize("options", [{"num_needles": 0}, {"num_needles": 10**6}, {"digits": 0}])
def test_impossible_tasks(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"needles must be 1 to \d+ and digits at least 1, got"):
        NeedleTask(TOKENIZER, HAYSTACK, **options)


def test_document_too_short_or_haystack_too_short() -> None:
    with pytest.raises(
        ValueError, match=r"8 needles and their questions take .* a document of 50 is too short"
    ) as error:
        TASK.make(50, 0)
    enough = int(re.findall(r"at least (\d+)", str(error.value))[0])
    assert len(TASK.make(enough, 0).tokens) == enough
    with pytest.raises(ValueError, match="is too short"):
        TASK.make(enough - 1, 0)
    with pytest.raises(ValueError, match=r"the haystack has 100 tokens, \d+ are needed"):
        NeedleTask(TOKENIZER, HAYSTACK[:100]).make(1000, 0)


def test_tokenizer_must_write_single_digits() -> None:
    class Bytes(Words):
        def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
            return [0] * (2 * len(text))

    with pytest.raises(ValueError, match="does not write single digits as single tokens"):
        NeedleTask(Bytes(), HAYSTACK)
