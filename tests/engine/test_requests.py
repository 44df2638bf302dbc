"""Where a request's new tokens are cut."""

import pytest

from seerattention.engine.requests import parts


@pytest.mark.parametrize(
    ("past", "new", "prompt", "expected"),
    [
        (0, 100, 100, [(0, 100)]),
        (32, 68, 100, [(32, 100)]),
        (30, 70, 100, [(30, 32), (32, 100)]),
        (30, 1, 100, [(30, 31)]),
        (100, 1, 100, [(100, 101)]),
        (96, 24, 100, [(96, 100), (100, 120)]),
        (90, 30, 100, [(90, 96), (96, 100), (100, 120)]),
        (40, 0, 100, []),
    ],
)
def test_parts(past, new, prompt, expected):
    assert parts(past, new, prompt, 16) == expected
