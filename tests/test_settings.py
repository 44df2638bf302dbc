"""Settings from files and from the command line, and back into a file."""

import tomllib
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seerattention.settings import build, explained, flat, known, read, to_toml, typed


@dataclass(frozen=True)
class Inner:
    """A part.

    Attributes:
        rate: How fast, in
            steps per second.
        seed: Of the part.
    """

    rate: float = 1.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Outer:
    """The whole.

    Attributes:
        name: What it is called.
        inner: Its part.
        seed: Of everything.
        paths: Where to look.
        table: Anything.
        range: One or two numbers.
        choice: Yes, no, or neither.
    """

    name: str
    inner: Inner = field(default_factory=Inner)
    seed: int = 0
    paths: tuple[str, ...] = ()
    table: dict[str, Any] = field(default_factory=dict)
    range: float | tuple[float, float] = 0.1
    choice: bool | None = None


def test_a_name_that_two_parts_have_counts_for_both():
    outer = build(Outer, {"name": "x", "seed": 3, "rate": 2})
    assert outer == Outer(name="x", seed=3, inner=Inner(2.0, 3))
    assert isinstance(outer.inner.rate, float)


def test_files_come_first_and_overrides_after(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('name = "file"\nseed = 1\n[table]\na = 1\n')
    values = read(path, ["name=other", "table.b=[1, 2]", "rate=1e-3", "paths=books/", "choice=true"])
    assert values.pop("table") == {"a": 1, "b": [1, 2]}
    assert values == {"name": "other", "seed": 1, "rate": 1e-3, "paths": "books/", "choice": True}
    outer = build(Outer, values)
    assert outer.paths == ("books/",)
    assert outer.choice is True


@given(
    st.text(),
    st.integers(),
    st.lists(st.text()),
    st.floats(allow_nan=False),
    st.dictionaries(
        st.from_regex(r"[a-z_]+", fullmatch=True), st.text() | st.booleans() | st.floats(allow_nan=False)
    ),
)
def test_what_is_written_is_read_back(name, seed, paths, rate, table):
    outer = Outer(name=name, seed=seed, paths=tuple(paths), inner=Inner(rate, seed), table=table)
    assert build(Outer, tomllib.loads(to_toml(flat(outer)))) == outer


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        ("x", float, "float, got 'x'"),
        (True, int, "int, got True"),
        (1, bool, "bool, got 1"),
        (1.5, int, "int, got 1.5"),
        ([1], tuple[float, float], r"tuple\[float, float\], got \[1\]"),
        ([1], tuple[str, ...], r"tuple\[str, ...\]"),
        ([1], dict[str, int], r"table, got \[1\]"),
    ],
)
def test_a_value_of_another_type_is_refused(value, hint, words):
    with pytest.raises(ValueError, match=rf"key must be of type {words}"):
        typed("key", value, hint)


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(
        ValueError, match=r"unknown 'rat' \(did you mean rate\?\); it may have name, rate, seed, paths"
    ):
        build(Outer, {"name": "x", "rat": 1})
    with pytest.raises(ValueError, match="the setting name is missing"):
        build(Outer, {})
    with pytest.raises(ValueError, match="here: unknown 'x'; it has no settings"):
        known("here", {"x"}, ())
    with pytest.raises(FileNotFoundError, match=r"there is no file .*no\.toml"):
        read(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_text("a = ")
    with pytest.raises(ValueError, match=r"bad\.toml is no TOML"):
        read(tmp_path / "bad.toml")
    for text in ("name", "=1", "name.x=1", "name.x.y=1"):
        with pytest.raises(ValueError, match="a setting must be key=value or table"):
            read(None, ["name=x", text])


def test_every_setting_is_explained_once_by_the_outermost_docstring():
    lines = {name: (default, about) for name, default, about in explained(Outer, "a.", ("table",))}
    assert lines["a.rate"] == ("1.0", "How fast, in steps per second.")
    assert lines["a.seed"] == ("0", "Of everything.")
    assert lines["a.name"] == ("", "What it is called.")
    assert "a.table" not in lines
    assert next(explained(Outer, defaults={"name": "x"}))[:2] == ("name", '"x"')
