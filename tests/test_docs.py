"""What the documentation names exists."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_name_in_the_documentation_exists(page):
    for module, path in re.findall(r"`(seerattention[\w.]*):([\w.]+)`", page.read_text()):
        found = importlib.import_module(module)
        for part in path.split("."):
            assert hasattr(found, part), f"{page.name} names {module}:{path}"
            found = getattr(found, part)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_and_path_in_the_documentation_exists(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for path in re.findall(r"`((?:src|tests|docs|recipes|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_the_method_page_has_a_row_for_every_part():
    text = (ROOT / "docs" / "method.md").read_text()
    assert len(re.findall(r"`seerattention[\w.]*:[\w.]+`", text)) >= 15


def test_the_readme_tables_are_those_of_the_result_files(run_script):
    # It exits where they are not.
    run_script(ROOT / "docs" / "readme.py", "--check")
