from __future__ import annotations

import re

import numpy as np
import pytest

from seerattention.measure.needle import NeedleDocument, NeedleTask, wordings


class Words:
    """A tokenizer of words with their leading space, single digits and signs."""

    pieces = r"\d| ?[^\W\d]+|\s|[^\w\s]"
    bos_token_id: int | None = None
    chat_template: str | None = None

    def __init__(self) -> None:
        self.words: list[str] = []

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        pieces = re.findall(self.pieces, text)
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


@pytest.mark.parametrize(("digits", "tokens"), [(r" ?\d{1,3}", 2), (r" ?\d+", 1), (r"\d{1,3}| (?=\d)", 2)])
def test_a_number_is_written_as_the_tokenizer_does(digits: str, tokens: int) -> None:
    class Numbers(Words):
        pieces = rf"{digits}| ?[^\W\d]+|\s|[^\w\s]"

    tokenizer = Numbers()
    for wording in wordings(tokenizer):
        document = NeedleTask(tokenizer, HAYSTACK, wording=wording).make(1000, 0)
        text = tokenizer.encode("".join(f" {value}" for value in document.values))
        assert len(document.answers) == 8
        for (start, stop), value in zip(document.answers, document.values, strict=True):
            assert stop - start == tokens
            assert tokenizer.decode(document.tokens[start:stop]).strip() == value
            assert set(document.tokens[start:stop]) <= set(text)


class Chat(Words):
    """The same, as of a model that talks and whose texts begin with a token of their own."""

    pieces = r"<[a-z]+>|" + Words.pieces
    bos_token = "<s>"
    chat_template = "{}"
    twice = refuses = False

    def __init__(self) -> None:
        super().__init__()
        self.bos_token_id = self.encode("<s>", add_special_tokens=False)[0]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return super().encode("<s>" * add_special_tokens + text)

    def get_chat_template(self) -> str | None:
        return self.chat_template

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, chat_template: str, tokenize: bool
    ) -> str:
        assert chat_template == self.chat_template
        assert not tokenize
        if self.refuses:
            raise TypeError("contents must be lists")
        turns = [f"<{m['role']}>{m['content'].strip()}<end>\n" for m in messages]
        return "<s>{be brief}" + "".join(turns) + turns[0] * self.twice


def test_a_document_in_each_wording_reads_as_a_model_of_it_expects() -> None:
    tokenizer, texts = Chat(), {}
    haystack = np.array(tokenizer.encode(" zig zag" * 500, add_special_tokens=False))
    for wording in wordings(tokenizer):
        document = NeedleTask(tokenizer, haystack, num_needles=2, wording=wording).make(400, 3)
        assert document.tokens.shape == (400,)
        text = tokenizer.decode(document.tokens)
        for (start, stop), key, value, place in zip(
            document.answers, document.keys, document.values, document.places, strict=True
        ):
            assert tokenizer.decode(document.tokens[start:stop]) == value
            stated = tokenizer.decode(document.tokens[slice(*place)])
            assert text.count(stated) == 1
            assert stated == wording.needle.replace("{key}", key).replace("{value}", value)
            text = text.replace(stated, "")
        (one, first), (two, second) = zip(document.keys, document.values, strict=True)
        text = text.replace(one, "ONE").replace(two, "TWO").replace(first, "1").replace(second, "2")
        whole = re.fullmatch(r"(.*?)(?: zig| zag){99,}(.*)", text, re.DOTALL)
        assert whole is not None
        texts[wording.name] = (whole[1], whole[2])
    ask = "\nWhat is the special magic number for {} mentioned in the provided text?"
    say = "The special magic number for {} mentioned in the provided text is {}"
    intro = (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz "
        "you about the number afterwards.\n"
    )
    plain = "".join(f"{ask} {say}.\n".format(key, key, n) for key, n in (("ONE", 1), ("TWO", 2)))
    chat = "".join(
        f"{ask}<end>\n<assistant>{say}.<end>\n<user>".format(key, key, n)
        for key, n in (("ONE", 1), ("TWO", 2))
    )
    assert texts == {
        "the bundled teacher's words": ("", "\nThe ONE? 1\n\nThe TWO? 2\n"),
        "RULER's words": ("<s>" + intro, plain),
        "RULER's words, in the chat template": ("<s>{be brief}<user>" + intro, chat),
    }


def test_a_model_is_asked_in_its_chat_template_only_where_that_says_a_message_once() -> None:
    tokenizer = Chat()
    tokenizer.twice = True
    plain = ["the bundled teacher's words", "RULER's words"]
    assert [wording.name for wording in wordings(tokenizer)] == plain
    assert [wording.name for wording in wordings(TOKENIZER)] == plain
    assert not wordings(TOKENIZER)[1].before.startswith("<s>")
    tokenizer.twice, tokenizer.refuses = False, True
    assert [wording.name for wording in wordings(tokenizer)] == plain
