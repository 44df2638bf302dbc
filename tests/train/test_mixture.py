"""Sequences in which something must be looked up: what they state they ask for, as a function of the step."""

import re

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from seerattention.train import Mixture, Packed, Packs, TextWindows
from seerattention.train.mixture import PASSAGE, WORDINGS, mixed
from seerattention.train.share import identity_of

WORDS = [
    a + b for a in ("bar", "cel", "dor", "fin", "gal", "hum", "lev") for b in ("ago", "ibis", "ora", "unt")
]


class Letters:
    """A tokenizer whose tokens are characters; with a template it writes chats."""

    bos_token_id = None

    def __init__(self, chat_template=None):
        self.chat_template = chat_template

    def encode(self, text, **options):
        return [ord(c) for c in text]

    def decode(self, tokens):
        return "".join(map(chr, tokens))

    def get_chat_template(self):
        return self.chat_template

    def apply_chat_template(self, messages, chat_template, tokenize):
        assert not tokenize
        return "".join(f"<{m['role']}>{m['content']}</>" for m in messages)


def mixture(length=2048, tokenizer=None, **shares):
    words = np.random.default_rng(0).choice(WORDS, 4000)
    tokens = np.array([ord(c) for c in " ".join(words)])
    return Mixture(TextWindows(tokens, length, 2, 3), tokenizer or Letters(), seed=5, **shares)


def found(text):
    """Return what a sequence states, and what it answers behind a question, by key."""
    stated, answered = {}, []
    for statement, question, answer in WORDINGS:
        form = re.escape(statement.strip()).replace(r"\{key\}", '(?P<key>[^ "]+?)')
        for match in re.finditer(form.replace(r"\{value\}", r"(?P<value>[\w-]+)"), text):
            stated.setdefault(match["key"], (match["value"], match.start()))
        both = re.escape(question) + r"(?:</><assistant>)?\s?" + re.escape(answer.strip())
        first, rest = both.replace(r"\{\}", r"\{key\}").split(r"\{key\}", 1)
        form = first + '(?P<key>[^ "]+?)' + rest.replace(r"\{key\}", "(?P=key)")
        for match in re.finditer(form.replace(r"\{value\}", r"(?P<value>[\w-]+)"), text):
            answered.append((match["key"], match["value"], match.start()))
    return stated, answered


@pytest.mark.parametrize("chat", [None, "a template"])
def test_what_is_asked_for_stands_before_it(chat):
    made, asked = mixture(tokenizer=Letters(chat), retrieval=1.0), 0
    for step in range(20):
        for row in made(step):
            assert row.shape == (2048,)
            stated, answered = found(Letters().decode(row))
            assert answered
            for key, value, place in answered:
                assert stated[key][0] == value
                assert stated[key][1] < place
            asked += len(answered)
    assert asked > 100


def test_a_name_has_one_value(monkeypatch):
    monkeypatch.setattr(Mixture, "_name", lambda self, rng: str(rng.choice(["some-name", "other-name"])))
    for step in range(10):
        for row in mixture(retrieval=1.0)(step):
            stated, answered = found(Letters().decode(row))
            assert sorted(key for key, _, _ in answered) == sorted(stated)


def test_chats_follow_the_tokenizers_template():
    rows = [
        Letters().decode(row)
        for step in range(20)
        for row in mixture(tokenizer=Letters("t"), retrieval=1.0)(step)
    ]
    chats = [row for row in rows if row.startswith("<user>")]
    assert 10 <= len(chats) <= 30
    assert all(row.count("<assistant>") == row.count("<user>") for row in chats)
    assert not any("<user>" in row for row in rows if row not in chats)


SAID = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"


def tokens_of_bytes(template):
    """A tokenizer of transformers whose tokens are bytes, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    tokenizer.chat_template = template
    return tokenizer


def made_by(template, steps=10, length=2048):
    """Texts of sequences with questions, by a tokenizer with a template."""
    tokenizer = tokens_of_bytes(template)
    words = " ".join(np.random.default_rng(0).choice(WORDS, 4000))
    windows = TextWindows(np.array(tokenizer.encode(words)), length, 2, 3)
    made = Mixture(windows, tokenizer, retrieval=1.0, seed=5)
    return [tokenizer.decode(row.tolist()) for step in range(steps) for row in made(step)]


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}" + SAID,
        "{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}",
        "{% for m in messages if m['role'] == 'user' %}<user>{{ m['content'] }}</>{% endfor %}",
        {"tool_use": SAID, "rag": SAID},
    ],
    ids=["other roles", "other contents", "no answers", "none by default"],
)
def test_a_template_that_writes_no_such_chats_leaves_texts(template):
    for text in made_by(template):
        assert "<user>" not in text
        assert found(text)[1]


def test_a_template_with_much_to_say_leaves_short_sequences_texts():
    for length, chats in ((1024, False), (4096, True)):
        rows = made_by("You are a model. " * 100 + SAID, length=length)
        assert all(found(text)[1] for text in rows)
        assert any("<user>" in text for text in rows) == chats


@pytest.mark.parametrize("write", ["strftime_now('%d %b %f')", 'strftime_now( "%H:%M:%S.%f" )'])
def test_the_day_does_not_change_the_text(write):
    first, second = made_by("{{ " + write + " }}" + SAID), made_by("{{ " + write + " }}" + SAID)
    assert any("<user>" in text for text in first)
    assert first == second


def test_passages_return():
    made, plain = mixture(repeats=1.0), mixture()
    for step in range(10):
        for row, before in zip(made(step), plain(step), strict=True):
            assert row.shape == before.shape
            changed = np.flatnonzero(row != before)
            assert len(changed)
            text = Letters().decode(row)
            windows = [text[i : i + PASSAGE[0]] for i in range(len(text) - PASSAGE[0])]
            assert len(set(windows)) < len(windows)


def test_shares_are_those_asked_for_and_the_rest_is_the_text():
    made, plain = mixture(retrieval=0.3, repeats=0.2), mixture()
    kinds = [0, 0, 0]
    for step in range(200):
        for row, before in zip(made(step), plain(step), strict=True):
            same = np.array_equal(row, before)
            kinds[0 if same else 1 if found(Letters().decode(row))[1] else 2] += 1
    assert kinds[0] / 400 == pytest.approx(0.5, abs=0.08)
    assert kinds[1] / 400 == pytest.approx(0.3, abs=0.08)


def test_steps_are_a_function_of_their_number_and_runs_of_their_settings():
    one, two = mixture(retrieval=0.5, repeats=0.5), mixture(retrieval=0.5, repeats=0.5)
    later = one(7)
    assert np.array_equal(two(7), later)
    assert np.array_equal(one(7), later)
    identities = {identity_of(mixture(retrieval=share)) for share in (0.0, 0.25, 0.5)}
    assert len(identities) == 3
    assert identity_of(one) == identity_of(two)


def test_a_pack_that_is_changed_becomes_one_document():
    documents = [np.full(300, ord("a") + i) for i in range(6)]
    made = Mixture(Packs(documents, 1000, 2, 64), Letters(), retrieval=0.5, seed=1)
    whole = 0
    for step in range(20):
        batch = made(step)
        assert isinstance(batch, Packed)
        for row, lengths in zip(batch.tokens, batch.lengths, strict=True):
            asks = bool(found(Letters().decode(row))[1])
            assert (lengths == (1000,)) == asks
            whole += asks
    assert 10 <= whole <= 30


@pytest.mark.parametrize("shares", [{"retrieval": 1.0}, {"repeats": 1.0}])
def test_what_pads_a_pack_is_no_part_of_its_document(shares):
    letters = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, (6, 470))
    plain = Packs(list(letters), 1000, 2, 64)
    made = Mixture(plain, Letters(), seed=1, **shares)
    for step in range(10):
        # Two documents of 470 tokens, and 60 that are too few for another.
        assert plain(step).lengths == ((470, 470, 60),) * 2
        batch = made(step)
        assert batch.lengths == ((940, 60),) * 2
        assert not batch.tokens[:, 940:].any()
        assert batch.tokens[:, :940].all()


@pytest.mark.parametrize(
    "shares", [{"retrieval": -0.1}, {"repeats": float("nan")}, {"retrieval": 0.7, "repeats": 0.4}]
)
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(ValueError, match=r"at least 0 and together at most 1; got .*, give both"):
        mixture(**shares)


@pytest.mark.parametrize("length", [64, 200])
def test_short_sequences_keep_their_length(length):
    made = mixture(length, Letters("t"), retrieval=0.6, repeats=0.4)
    assert {made(step).shape for step in range(30)} == {(2, length)}


def test_of_windows_the_nearest_whole_numbers_are_changed():
    words = " ".join(np.random.default_rng(0).choice(WORDS, 8000))
    windows = list(np.array([ord(c) for c in words])[: 12 * 2048].reshape(12, 2048))
    before = [window.copy() for window in windows]
    made = mixed(windows, Letters(), retrieval=0.25, repeats=0.1)
    assert all(np.array_equal(a, b) for a, b in zip(windows, before, strict=True))
    assert [len(row) for row in made] == [2048] * 12
    assert [bool(found(Letters().decode(row))[1]) for row in made] == [True] * 3 + [False] * 9
    assert [np.array_equal(a, b) for a, b in zip(made, windows, strict=True)] == [False] * 4 + [True] * 8
    again = mixed(windows, Letters(), retrieval=0.25, repeats=0.1)
    assert all(np.array_equal(a, b) for a, b in zip(made, again, strict=True))
    # Of three windows one asks; a quarter of one window is none.
    assert sum(bool(found(Letters().decode(row))[1]) for row in mixed(windows[:3], Letters(), 0.25, 0.1)) == 1
    assert np.array_equal(mixed(windows[:1], Letters(), 0.25, 0.1)[0], windows[0])
    with pytest.raises(ValueError, match="shares of the sequences, at least 0 and together at most 1"):
        mixed(windows, Letters(), 0.95, 0.1)
