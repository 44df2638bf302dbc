"""The README's table of what attached models can do: a check for every line, for each 'no' its reason."""

import importlib
from pathlib import Path

from seerattention.hosts.transformers.support import features


def test_every_line_has_its_check():
    checked, told = {}, {}
    for file in Path(__file__).parent.glob("test_features_*.py"):
        module = importlib.import_module(f"tests.hosts.transformers.{file.stem}")
        checked[module.KIND] = list(module.CHECKS)
    for feature in features():
        told.setdefault(feature.kind, []).append(feature.name)
    assert checked == told
