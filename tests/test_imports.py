"""The direction of dependencies, and what an import of the package does."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import seerattention
import seerattention.train

PACKAGE = Path(seerattention.__file__).parent
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))

#: What a part may import besides itself, read from docs/design.md: everything in the layers before.
LAYERS = [
    {"rows", "later", "wording"},
    {"selection", "scorer", "files", "device", "settings"},
    {"policies", "crossover", "gate_config"},
    {"ops"},
    {"gate"},
    {"baselines"},
    {"attention", "testing"},
    {"engine"},
    {"parallel"},
    {"hosts"},
    {"measure", "train"},
    {"calibration", "evals"},
    {"bench", "demo"},
    {"cli"},
]
#: Rooms that know a framework.
TRANSFORMERS = {"hosts", "measure", "train", "calibration", "evals", "bench", "demo", "cli"}


def modules_imported(source: str, package: str) -> Iterator[str]:
    """Names of the modules that a file of ``package`` imports, at any depth of its code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports_of(file: Path) -> set[str]:
    package = ".".join(["seerattention", *file.parent.parts])
    return set(modules_imported((PACKAGE / file).read_text(encoding="utf-8"), package))


def part_of(module: str) -> str | None:
    """The part of the project that a module belongs to, None for others' modules and the root."""
    names = module.split(".")
    known = set().union(*LAYERS)
    return names[1] if names[0] == "seerattention" and len(names) > 1 and names[1] in known else None


def part_of_file(file: Path) -> str:
    return file.parts[0].removesuffix(".py")


def wrong_direction(part: str, imported: str) -> bool:
    if part == imported:
        return False
    level = next(i for i, layer in enumerate(LAYERS) if part in layer)
    return not any(imported in layer for layer in LAYERS[:level])


def violations(file: Path, imported: set[str]) -> set[str]:
    """Imports of a file that break a rule."""
    part = part_of_file(file)
    if part in ("__init__", "__main__"):
        return {m for m in imported if m.split(".")[0] in ("transformers", "triton")}
    wrong = {m for m in imported if (other := part_of(m)) and wrong_direction(part, other)}
    if part not in TRANSFORMERS:
        wrong |= {m for m in imported if m.split(".")[0] == "transformers"}
    if not knows_triton(file):
        wrong |= {m for m in imported if m.split(".")[0] == "triton"}
    if not is_backend(file):
        return wrong
    op = ".".join(["seerattention", *file.parts[:2]])
    siblings = {path.stem for path in (PACKAGE / file).parent.glob("[!_]*.py")}
    return wrong | {m for m in imported if m.startswith(f"{op}.") and m.split(".")[3] in siblings}


def is_backend(file: Path) -> bool:
    folder = (PACKAGE / file).parent
    return folder.parent == PACKAGE / "ops" and file.name[0] != "_" and (folder / "reference.py").exists()


def knows_triton(file: Path) -> bool:
    """Whether a file is a backend, its kernels, or what kernels share."""
    shared = file.as_posix() in ("ops/language.py", "ops/tma.py")
    return shared or is_backend(file) or "kernels" in file.parts or file.name == "_triton_kernel.py"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_dependencies_point_one_way(file: Path) -> None:
    assert part_of_file(file) in {"__init__", "__main__", *set().union(*LAYERS)}, "a part without a layer"
    assert violations(file, imports_of(file)) == set()


@pytest.mark.parametrize(
    ("file", "line", "wrong"),
    [
        ("selection.py", "from seerattention.gate import AttnGate", True),
        ("selection.py", "def f():\n    from seerattention import gate", True),
        ("policies/top_k.py", "from seerattention.rows import num_blocks", False),
        ("policies/top_k.py", "from seerattention.ops import dispatch", True),
        ("policies/top_k.py", "from ..attention import select_blocks", True),
        ("gate.py", "import transformers.models", True),
        ("hosts/transformers/families/llama.py", "import transformers.models", False),
        ("hosts/transformers/families/llama.py", "from seerattention.evals import needle", True),
        ("ops/block_sparse_attention/__init__.py", "import triton", True),
        ("ops/block_sparse_attention/gather.py", "import triton.language as tl", False),
        ("ops/block_sparse_attention/kernels/hopper.py", "import triton.language as tl", False),
        ("ops/options.py", "import triton.language as tl", True),
        ("ops/block_sparse_attention/gather.py", "from . import flex", True),
        ("ops/block_sparse_attention/gather.py", "from .reference import run", True),
        ("ops/block_sparse_attention/gather.py", "from seerattention.ops.dispatch import check_qkv", False),
        ("__init__.py", "import transformers", True),
    ],
)
def test_the_rules_notice(file: str, line: str, wrong: bool) -> None:
    package = ".".join(["seerattention", *Path(file).parent.parts])
    assert bool(violations(Path(file), set(modules_imported(line, package)))) == wrong


def module_of(file: Path) -> str:
    names = ["seerattention", *file.with_suffix("").parts]
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


MODULES = {module_of(file): file for file in FILES}


def private_elsewhere(package: str, imported: set[str]) -> set[str]:
    """Imports, by a file of ``package``, of what starts with an underscore and is another folder's.

    A module belongs to its folder and the folders in it, a name to the folder of its module.
    """
    found = set()
    for module in imported:
        names = module.split(".")
        for i, name in enumerate(names):
            if names[0] == "seerattention" and name.startswith("_") and not name.startswith("__"):
                home = ".".join(names[:i])
                file = MODULES.get(home)
                folder = home if file is None or file.name == "__init__.py" else home.rpartition(".")[0]
                within = f"{package}.".startswith(f"{folder}.") and f"{home}.{name}" in MODULES
                if package != folder and not within:
                    found.add(module)
    return found


@pytest.mark.parametrize("file", FILES, ids=str)
def test_what_is_private_stays_in_its_folder(file: Path) -> None:
    package = ".".join(["seerattention", *file.parent.parts])
    assert private_elsewhere(package, imports_of(file)) == set()


@pytest.mark.parametrize("folder", ["benchmarks", "docs", "examples", "experiments", "recipes"])
def test_what_is_private_stays_in_the_package(folder: str) -> None:
    for file in (Path(__file__).parents[1] / folder).rglob("*.py"):
        imported = set(modules_imported(file.read_text(encoding="utf-8"), ""))
        assert private_elsewhere("", imported) == set(), file


@pytest.mark.parametrize(
    ("package", "line", "wrong"),
    [
        ("seerattention.ops", "from seerattention.ops.gather._parts import f", True),
        ("seerattention.ops", "from seerattention.rows import _edges", True),
        ("seerattention", "from seerattention.rows import _edges", False),
        ("seerattention", "from .ops import _private", True),
        ("seerattention.ops.block_sparse_attention.kernels", "from .._autograd import run", False),
        ("seerattention.ops.block_sparse_attention.kernels", "from ..gather import _parts", True),
        ("seerattention.ops.pooled_attention", "from ..block_sparse_attention._autograd import run", True),
        ("seerattention", "from torch._dynamo import config", False),
        ("seerattention.ops", "from seerattention.rows import __doc__", False),
    ],
)
def test_the_rule_of_private_names_notices(package: str, line: str, wrong: bool) -> None:
    assert bool(private_elsewhere(package, set(modules_imported(line, package)))) == wrong


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Circles of a graph: each one's nodes in order, found by walking from every node once."""
    found, done, path = [], set(), []

    def walk(node: str) -> None:
        if node in path:
            found.append(path[path.index(node) :])
        elif node not in done:
            path.append(node)
            for other in sorted(graph.get(node, ())):
                walk(other)
            done.add(path.pop())

    for node in sorted(graph):
        walk(node)
    return found


def test_no_file_imports_itself_in_a_circle() -> None:
    graph = {}
    for module, file in MODULES.items():
        imported = {m for m in imports_of(file) if m in MODULES}
        # A folder's own file gathers what the folder holds; that may name the folder.
        graph[module] = {m for m in imported if not f"{module}.".startswith(f"{m}.")}
    assert circles(graph) == []


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": set(), "d": {"a"}}) == []
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]
    assert circles({"a": {"a"}}) == [["a"]]


@pytest.mark.parametrize("file", [f for f in FILES if part_of_file(f) != "cli"], ids=str)
def test_nothing_is_printed_outside_the_command_line(file: Path) -> None:
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert "print" not in called


def python(code: str) -> str:
    path = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n"
    run = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_importing_brings_no_transformers_and_every_backend_of_an_op() -> None:
    loaded = python(
        "import seerattention, seerattention.baselines, seerattention.engine.summaries\n"
        "import seerattention.ops.block_sparse_attention as op\n"
        "others = ('transformers', 'datasets', 'rich', 'typer')\n"
        "print([m for m in sys.modules if m.split('.')[0] in others])\n"
        "print(all(b.__name__ in sys.modules for b in op.BACKENDS.values()))"
    )
    assert loaded == "[]\nTrue\n"


def test_importing_changes_nothing() -> None:
    # Even with transformers there, an import registers no attention function and sets no variable.
    code = """
import os, random, torch, warnings
import torch.nn.attention.flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.models.llama import modeling_llama

def state():
    return (
        sorted(AttentionInterface().keys()),
        sorted(AttentionMaskInterface().keys()),
        {n: id(f) for n, f in vars(modeling_llama).items()},
        {n: id(f) for n, f in vars(torch.nn.functional).items()},
        dict(os.environ),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.initial_seed(),
        torch.is_grad_enabled(),
        random.getstate(),
    )

before = state()
import seerattention, seerattention.hosts.transformers, seerattention.demo.run
print(before == state())
"""
    assert python(code) == "True\n"


@pytest.mark.parametrize("package", [seerattention, seerattention.train], ids=lambda p: p.__name__)
def test_public_names_are_there_and_are_those_that_type_checkers_see(package: ModuleType) -> None:
    checked = next(n for n in ast.parse(inspect.getsource(package)).body if isinstance(n, ast.If))
    imports = [n for n in checked.body if isinstance(n, ast.ImportFrom)]
    assert {a.name for n in imports for a in n.names} == set(dir(package)) - set(vars(package))
    for node in imports:
        for alias in node.names:
            home = importlib.import_module(str(node.module))
            assert getattr(package, alias.name) is getattr(home, alias.name)
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        package.magic  # noqa: B018
    starred: dict[str, object] = {}
    exec(f"from {package.__name__} import *", starred)
    assert set(starred) - {"__builtins__"} == {a.name for n in imports for a in n.names}
    assert {"attach", "detach", "AttnGate", "seer_attention", "TopK"} <= set(dir(seerattention))


def test_help_needs_no_torch() -> None:
    code = """
from typer.testing import CliRunner
from typer.main import get_command
from seerattention.cli import app

def paths(command, path=()):
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from paths(inner, (*path, name))

asked = list(paths(get_command(app())))
for path in asked:
    result = CliRunner().invoke(app(), [*path, "--help"])
    assert result.exit_code == 0 and "Usage" in result.output, (path, result.output)
heavy = ("torch", "transformers", "accelerate", "datasets", "huggingface_hub", "matplotlib")
print(len(asked) > 12, [name for name in heavy if name in sys.modules])
"""
    assert python(code) == "True []\n"
