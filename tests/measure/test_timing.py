"""Times of several variants, taken in turn."""

from __future__ import annotations

import pytest

from seerattention.measure.timing import interleaved


def test_timing_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock = iter(float(x * x) for x in range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    seconds = interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        repeats=3,
        warmup=1,
        after=calls.append,
    )
    assert "".join(calls) == "aabb" * 4
    # Between readings n and n + 1 lie 2n + 1 seconds. Every call reads twice: timed calls of a start at
    # readings 4, 8, 12 and those of b at 6, 10, 14.
    assert seconds == {"a": [2 * n + 1 for n in (4, 8, 12)], "b": [2 * n + 1 for n in (6, 10, 14)]}
