import json

import numpy as np
import pytest

from seerattention.distill import TextWindows, read_tokens


class Bytes:
    """A tokenizer whose tokens are bytes."""

    eos_token_id = 0

    def encode(self, text, add_special_tokens=True):
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


def test_unreadable_text_is_refused_by_name(tmp_path):
    (tmp_path / "a.md").write_text("x")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"txt": 1}\n')
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no\.txt"):
        read_tokens([tmp_path / "no.txt"], Bytes())
    with pytest.raises(ValueError, match=r"neither \.txt nor \.jsonl"):
        read_tokens([tmp_path / "a.md"], Bytes())
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2"):
        read_tokens([tmp_path / "bad.jsonl"], Bytes())
    with pytest.raises(ValueError, match="there is no text"):
        read_tokens([tmp_path / "empty.txt"], Bytes())
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \.txt"):
        read_tokens([tmp_path / "folder"], Bytes())
