import json
import os

import numpy as np
import pytest

from seerattention.train import Packs, TextWindows, dataset_documents, read_tokens
from seerattention.train.data import row_tokens


class Bytes:
    """A tokenizer whose tokens are bytes."""

    eos_token_id = 0

    def encode(self, text, **options):
        return list(text.encode())


def test_windows_are_a_function_of_the_step():
    text = np.arange(1000)
    windows = TextWindows(text, 50, sequences=3, seed=4)
    batch = windows(7)
    assert batch.shape == (3, 50)
    assert batch.dtype == np.int64
    assert np.array_equal(batch, TextWindows(text, 50, sequences=3, seed=4)(7))
    assert not np.array_equal(batch, windows(8))
    assert not np.array_equal(batch, TextWindows(text, 50, sequences=3, seed=5)(7))
    assert np.array_equal(batch - batch[:, :1], np.tile(np.arange(50), (3, 1)))


def test_a_window_may_be_the_whole_text():
    assert np.array_equal(TextWindows(np.arange(5), 5)(0), [np.arange(5)])


@pytest.mark.parametrize(("length", "sequences"), [(6, 1), (0, 1), (1, 0)])
def test_windows_that_do_not_fit_are_refused(length, sequences):
    with pytest.raises(ValueError, match=r"fewer than one sequence|at least 1"):
        TextWindows(np.arange(5), length, sequences)


def test_reads_text_json_lines_and_folders_with_an_end_token_behind_each(tmp_path):
    (tmp_path / "a.txt").write_text("ab")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "c"}) + "\n" + json.dumps({"text": "d"}) + "\n")
    (tmp_path / "ignored.md").write_text("x")
    expected = [97, 98, 0, 99, 0, 100, 0]
    assert read_tokens([tmp_path], Bytes()).tolist() == expected
    assert read_tokens([tmp_path / "a.txt", tmp_path / "b.jsonl"], Bytes()).tolist() == expected


def test_folders_are_read_with_theirs_and_code_is_text(tmp_path):
    (tmp_path / "src" / "deep").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    (tmp_path / "src" / "deep" / "b.py").write_text("p")
    (tmp_path / "src" / "a.cu").write_text("c")
    (tmp_path / "z.txt").write_text("t")
    for name in (".git/x.py", "src/.hidden.txt", "src/picture.png"):
        (tmp_path / name).write_text("no")
    (tmp_path / "src" / "again").symlink_to(tmp_path)
    (tmp_path / "src" / "gone.txt").symlink_to(tmp_path / "nothing.txt")
    os.mkfifo(tmp_path / "src" / "pipe.txt")
    assert read_tokens([tmp_path], Bytes()).tolist() == [99, 0, 112, 0, 116, 0]
    assert read_tokens([tmp_path / "src" / "deep" / "b.py"], Bytes()).tolist() == [112, 0]


def test_unreadable_text_is_refused_by_name(tmp_path):
    (tmp_path / "a.md").write_text("x")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"txt": 1}\n')
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(FileNotFoundError, match=r"no\.txt"):
        read_tokens([tmp_path / "no.txt"], Bytes())
    with pytest.raises(ValueError, match=r"neither \.txt nor \.jsonl"):
        read_tokens([tmp_path / "a.md"], Bytes())
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2"):
        read_tokens([tmp_path / "bad.jsonl"], Bytes())
    with pytest.raises(ValueError, match="there is no text"):
        read_tokens([tmp_path / "empty.txt"], Bytes())
    with pytest.raises(ValueError, match=r"latin\.txt is no text in UTF-8"):
        read_tokens([tmp_path / "latin.txt"], Bytes())
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \.txt"):
        read_tokens([tmp_path / "folder"], Bytes())


def test_lines_of_json_end_at_line_feeds_alone(tmp_path):
    texts = [f"a{mark}b" for mark in "\u2028\u2029\x85\x1c\v\f\r\n"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_bytes("\r\n".join(lines).encode())
    assert read_tokens([tmp_path / "a.jsonl"], Bytes()).tolist() == [
        *b"".join(text.encode() + b"\0" for text in texts)
    ]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("3", "got a int"),
        ('"messages"', "got a str"),
        ("[1]", "got a list"),
        ('{"text": 3}', "must have text or messages"),
        ('{"text": "\\ud800"}', "surrogates not allowed"),
        ('{"messages": 3}', "messages must be a list of"),
        ('{"messages": "me"}', "messages must be a list of"),
        ('{"messages": [3]}', "messages must be a list of"),
        ('{"messages": [{"role": "me"}]}', "chat template refuses these messages"),
        ("[" * 10**5, "no JSON that can be read"),
        ("1" * 10**4, "no JSON that can be read"),
    ],
)
def test_rows_of_another_shape_are_refused_by_their_line(tmp_path, row, said):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + row + "\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2.*{said}"):
        read_tokens([tmp_path / "a.jsonl"], ChatTokenizer())


def packs(lengths, length=100, sequences=2, least=16):
    documents = [np.full(n, i + 1) for i, n in enumerate(lengths)]
    return Packs(lambda: documents, length, sequences, least)


def test_packs_hold_whole_documents_in_order_and_count_what_is_dropped():
    made = packs([60, 10, 90, 30])
    first = made(0)
    assert first.lengths == ((60, 40), (50, 30, 20))
    assert first.tokens.shape == (2, 100)
    assert [sorted(set(row.tolist())) for row in first.tokens] == [[1, 3], [1, 3, 4]]
    assert made.dropped == 1


def test_room_too_small_to_learn_from_is_filled_as_a_document_of_its_own():
    packed = packs([90, 90])(0)
    assert packed.lengths == ((90, 10), (90, 10))
    assert (packed.tokens[:, 90:] == 0).all()


def test_packs_of_a_step_are_the_same_in_any_order_of_asking():
    lengths = [60, 10, 90, 30, 250]
    straight = [packs(lengths)(step) for step in range(6)]
    asked = packs(lengths)
    for step in (4, 0, 0, 5, 2):
        again = asked(step)
        assert again.lengths == straight[step].lengths
        assert (again.tokens == straight[step].tokens).all()
    for one in straight:
        assert all(sum(row) == 100 for row in one.lengths)


def test_documents_that_are_all_too_short_are_refused():
    with pytest.raises(ValueError, match="no document has 16 tokens"):
        packs([5, 10])(0)
    with pytest.raises(ValueError, match="length 10 is below 16"):
        packs([50], length=10)


class ChatTokenizer:
    eos_token_id = 0
    chat_template = "yes"

    def get_chat_template(self):
        return self.chat_template

    def apply_chat_template(self, messages, chat_template, tokenize):
        assert not tokenize
        return "".join(m["content"] for m in messages)

    def encode(self, text, **options):
        return [ord(c) for c in text]


def test_rows_are_text_or_messages():
    tokenizer = ChatTokenizer()
    assert row_tokens({"text": "ab"}, tokenizer).tolist() == [97, 98, 0]
    assert row_tokens({"messages": [{"role": "user", "content": "ab"}]}, tokenizer).tolist() == [97, 98]
    with pytest.raises(ValueError, match=r"must have text or messages, this one has \['id'\]"):
        row_tokens({"id": 1}, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        row_tokens({"messages": []}, tokenizer)


def test_a_dataset_is_streamed_again_from_the_start(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "ab"}\n{"text": "c"}\n')
    documents = dataset_documents(str(tmp_path), ChatTokenizer())
    for _ in range(2):
        assert [d.tolist() for d in documents()] == [[97, 98, 0], [99, 0]]
