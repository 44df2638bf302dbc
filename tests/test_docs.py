"""What the documentation names exists."""

import ast
import importlib
import re
import shlex
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import typer.main

from seerattention.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
FOLDERS = "src|tests|docs|recipes|benchmarks|examples|experiments"
#: Options of other programs: lm-eval, compute-sanitizer.
OTHERS = {"--batch_size", "--tool", "--additional-config"}
pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


def anchors(page: Path) -> set[str]:
    """Return what a link may name after ``#``: headings in lower case, words joined, other signs left out."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pages
def test_every_name_in_the_documentation_exists(page):
    for module, path in re.findall(r"`(seerattention[\w.]*):([\w.]+)`", page.read_text()):
        found = importlib.import_module(module)
        for part in path.split("."):
            assert hasattr(found, part), f"{page.name} names {module}:{path}"
            found = getattr(found, part)
    for name in re.findall(r"`(seerattention(?:\.\w+)+)`", page.read_text()):
        module, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(module), last) or importlib.import_module(name)


@pages
def test_every_import_in_the_documentation_works(page):
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("seerattention"):
                module = importlib.import_module(node.module)
                missing = [name.name for name in node.names if not hasattr(module, name.name)]
                assert not missing, f"{page.name} imports {missing} from {node.module}"


@pages
def test_every_link_and_path_in_the_documentation_exists(page):
    text = page.read_text()
    for target, anchor in re.findall(r"""(?:\]\(|(?:src|srcset)=")([^)#"\s]*)#?([^)"\s]*)[)"]""", text):
        if "://" in target:
            continue
        linked = page.parent / target if target else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}#{anchor}"
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def commands(command=None, name=()):
    """Yield every command by its words, groups of commands included."""
    command = command or typer.main.get_command(app())
    yield name, command
    for word, found in getattr(command, "commands", {}).items():
        yield from commands(found, (*name, word))


def options(command):
    """Return the options of a command."""
    return {option for parameter in command.params for option in parameter.opts} | {"--help"}


@pages
def test_every_command_and_option_in_the_documentation_exists(page):
    text, known = page.read_text().replace("\\\n", " "), dict(commands())
    lines = re.findall(r"^seerattention .*$", text, re.M) + re.findall(r"`(seerattention [^`]*)`", text)
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        name = max((tuple(words[:n]) for n in range(3) if tuple(words[:n]) in known), key=len)
        assert name, f"{page.name} names the command {line!r}"
        asked = {word.split("=")[0] for word in words if word.startswith("--")}
        assert asked <= options(known[name]), f"{page.name}: {line!r} has {asked - options(known[name])}"
        keys = getattr(sys.modules[known[name].callback.__module__], "keys", list)()
        given = {word.split("=")[0] for before, word in pairwise(words) if before == "--set"}
        assert given <= {key for key, *_ in keys}, f"{page.name}: {line!r} sets {given}"
    # Options by themselves are those of some command, or of a script here.
    scripts = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    every = set().union(*map(options, known.values()))
    for option in set(re.findall(r"`(--[a-z][\w-]*)", text)) - every - OTHERS:
        assert f'"{option}"' in scripts, f"{page.name} names the option {option}"


def test_the_readme_names_every_extra_and_the_code_no_other():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    install = (ROOT / "README.md").read_text().partition("## Install")[2].partition("\n## ")[0]
    for name, packages in extras.items():
        row = re.search(rf"^\| `{name}` \|.*$", install, re.M)
        assert row, f"the README does not say what {name} is for"
        own = {re.split(r"[<>=]", package)[0] for package in packages}
        own -= {"datasets"} if name == "eval" else set()
        assert own <= set(re.findall(r"[\w-]+", row[0])), row[0]
    named = {
        e for f in (ROOT / "src").rglob("*.py") for e in re.findall(r"seerattention\[(\w+)\]", f.read_text())
    }
    assert named <= set(extras)


def test_every_package_that_is_imported_is_a_dependency_or_in_an_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [
        *project["dependencies"],
        *(p for extra in project["optional-dependencies"].values() for p in extra),
    ]
    # triton comes with torch on a GPU, tqdm with lm-eval.
    known = {re.split(r"[<>=]", p)[0].replace("-", "_") for p in listed} | {"triton", "tqdm", "seerattention"}
    imported = set()
    for file in (ROOT / "src").rglob("*.py"):
        if file.parent.name == "vllm":
            # Loaded by vLLM, beside which this package is installed.
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) <= known


def test_the_method_page_has_a_row_for_every_part():
    text = (ROOT / "docs" / "method.md").read_text()
    assert len(re.findall(r"`seerattention[\w.]*:[\w.]+`", text)) >= 15


def test_the_generated_parts_are_those_of_the_result_files(run_script):
    # It exits where they are not.
    run_script(ROOT / "docs" / "readme.py", "--check")
