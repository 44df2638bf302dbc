"""Settings: dataclasses filled from a TOML file and from ``key=value``, explained, and written back."""

from __future__ import annotations

import difflib
import inspect
import json
import re
import reprlib
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def read(path: Path | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a TOML file, and over it ``key=value`` or ``table.key=value``.

    Args:
        path: The file; None reads none.
        overrides: Values are as in TOML; what is no TOML is text.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no TOML, or an override is no ``key=value``.
    """
    values: dict[str, Any] = {}
    if path is not None:
        if not path.exists():
            raise FileNotFoundError(f"there is no file {path}")
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        # Brackets within brackets, deeper than Python reads.
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is no TOML: {error}") from error
    for text in overrides:
        name, sign, value = text.partition("=")
        *tables, key = name.strip().split(".")
        place: Any = values
        for table in tables:
            place = place.setdefault(table, {}) if isinstance(place, dict) else None
        if not sign or not key or not isinstance(place, dict):
            raise ValueError(f"a setting must be key=value or table.key=value, got {text!r}")
        try:
            place[key] = tomllib.loads(f"value = {value}")["value"]
        except (tomllib.TOMLDecodeError, RecursionError):
            place[key] = value.strip()
    return values


def known(where: str, given: Iterable[str], names: Sequence[str]) -> None:
    """Refuse names that there are not, with the nearest ones that there are.

    Raises:
        ValueError: If one is unknown.
    """
    if unknown := sorted(set(given) - set(names)):
        near = [match for name in unknown for match in difflib.get_close_matches(name, names, 1)]
        what = f"it may have {', '.join(names)}" if names else "it has no settings"
        mean = f" (did you mean {', '.join(near)}?)" if near else ""
        raise ValueError(f"{where}: unknown {', '.join(map(repr, unknown))}{mean}; {what}")


def build(kind: type[T], values: Mapping[str, Any], where: str = "settings", prefix: str = "") -> T:
    """Make a dataclass of values; fields that are dataclasses take theirs from the same values.

    Args:
        kind: The dataclass.
        values: By name. A name that several dataclasses have counts for all of them.
        where: What the values are called if one is unknown.
        prefix: Before the names in what is said of values.

    Raises:
        ValueError: If a name is unknown, a value of another type, or one without a default missing.
    """
    known(where, values, list(_leaves(kind)))
    return _build(kind, values, prefix)


def flat(settings: Any) -> dict[str, Any]:
    """Return the values that `build` makes these settings of, without those that are None."""
    found: dict[str, Any] = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        found.update(flat(value) if is_dataclass(value) else {} if value is None else {field.name: value})
    return found


def to_toml(values: Mapping[str, Any]) -> str:
    """Write values, and tables of them, as TOML that `read` reads."""
    lines = [f"{key} = {_literal(value)}" for key, value in values.items() if not isinstance(value, Mapping)]
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            lines += ["", f"[{key}]", to_toml(value).rstrip()]
    return "\n".join(lines) + "\n"


def explained(
    kind: type, prefix: str = "", without: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, str, str]]:
    """Yield every setting's name, default, empty where there is none, and what its docstring says it is.

    ``defaults`` go before those of the class.
    """
    for name, (field, about) in _leaves(kind).items():
        default = field.default if field.default_factory is MISSING else field.default_factory()
        default = (defaults or {}).get(name, default)
        shown = "" if default in (MISSING, None, "", (), {}) else _literal(default)
        if name not in without:
            yield prefix + name, shown, about


def _leaves(kind: type) -> dict[str, tuple[Field[Any], str]]:
    """Return every setting by name, the first of several, with its field and the outermost description."""
    found: dict[str, tuple[Field[Any], str]] = {}
    hints, about = get_type_hints(kind), _attributes(kind)
    for field in fields(kind):
        inner, leaf = hints[field.name], (field, about.get(field.name, ""))
        leaves = _leaves(inner) if is_dataclass(inner) else {field.name: leaf}  # type: ignore[arg-type]
        for name, (one, text) in leaves.items():
            found.setdefault(name, (one, about.get(name, text)))
    return found


def _attributes(kind: type) -> dict[str, str]:
    """Return the descriptions in the docstrings of a class and of those it inherits from."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        _, _, section = inspect.cleandoc(one.__dict__.get("__doc__") or "").partition("Attributes:\n")
        section = section.split("\n\n")[0]
        for name, text in re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section, re.MULTILINE):
            found[name] = " ".join(text.split()).replace("``", "")
    return found


def _build(kind: type[T], values: Mapping[str, Any], prefix: str) -> T:
    made: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for field in fields(kind):  # type: ignore[arg-type]
        name, hint = field.name, hints[field.name]
        if is_dataclass(hint):
            made[name] = _build(hint, values, prefix)  # type: ignore[arg-type]
        elif name in values:
            made[name] = typed(prefix + name, values[name], hint)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"the setting {prefix}{name} is missing")
    return kind(**made)


def typed(name: str, value: Any, hint: Any) -> Any:
    """Return a value as a type hint has it: a list as a tuple, a whole number as a float.

    Raises:
        ValueError: If it is of another type.
    """
    try:
        return _as(value, hint)
    except (TypeError, OverflowError):
        if get_origin(hint) is Literal:
            allowed = ", ".join(map(repr, get_args(hint)))
            raise ValueError(f"{name} must be one of {allowed}, got {reprlib.repr(value)}") from None
        said = hint.__name__ if isinstance(hint, type) else str(hint)
        said = "table" if (get_origin(hint) or hint) is dict else said
        raise ValueError(f"{name} must be of type {said}, got {reprlib.repr(value)}") from None


def _as(value: Any, hint: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for one in arguments:
            try:
                return _as(value, one)
            except TypeError:
                continue
    elif origin is Literal:
        if value in arguments:
            return value
    elif origin is tuple:
        many = arguments[-1] is Ellipsis
        items = list(value) if isinstance(value, list | tuple) else [value] if many else []
        kinds = arguments[:1] * len(items) if many else arguments
        if len(kinds) == len(items):
            return tuple(map(_as, items, kinds))
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, origin or hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise TypeError


def _literal(value: Any) -> str:
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return repr(value)
