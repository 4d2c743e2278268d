"""The package in pipeline order: a module imports only its own layer and earlier ones."""

import ast
import sys

import pytest

from cdelta.paths import ROOT

LAYERS = (
    "errors",
    "files",
    "memory",
    "state",
    "paths",
    "settings",
    "models",
    "policy",
    "attribution",
    "circuit",
    "delta",
    "evaluation",
    "edit",
    "methods",
    "artifact",
    "cli",
)
CORE = ("models", "attribution", "circuit", "delta", "edit")
BARE = {"torch", "transformers", "numpy", "safetensors", "tqdm", "huggingface_hub", "pandas"}
"""What a bare GPU box has: tqdm and huggingface_hub come with transformers, pandas with most."""
CORE_MAY_USE = BARE | {"tokenizers", "jinja2", "jaxtyping", "pandas", "yaml"}
"""pandas where rows are handled; jinja2 and yaml for model cards and templates."""
PACKAGE = ROOT / "cdelta"
MODULES = sorted(PACKAGE.rglob("*.py"))


def layer(path):
    """The position of a module's layer; the package's own ``__init__`` stands above everything."""
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return len(LAYERS) if name == "__init__" else LAYERS.index(name)


def imports(path, everywhere):
    """Dotted names that a file imports, at its top level or `everywhere` in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def own_files(names):
    """Files of this package among dotted names."""
    for name in names:
        base = ROOT.joinpath(*name.split("."))
        if name.split(".")[0] == "cdelta":
            candidates = (base.with_suffix(".py"), base / "__init__.py")
            yield from (file for file in candidates if file.exists())


def foreign(names):
    """First parts of dotted names that are neither ours nor Python's."""
    return {name.split(".")[0] for name in names} - {"cdelta"} - sys.stdlib_module_names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_to_earlier_layers(path):
    above = {
        str(file.relative_to(PACKAGE))
        for file in own_files(imports(path, everywhere=True))
        if file != PACKAGE / "__init__.py" and layer(file) > layer(path)
    }
    assert not above


@pytest.mark.parametrize("room", CORE)
def test_the_core_uses_few_packages(room):
    used = set()
    for path in (PACKAGE / room).rglob("*.py"):
        used |= foreign(imports(path, everywhere=True))
    assert used <= CORE_MAY_USE


def test_the_gpu_script_loads_only_what_a_bare_gpu_box_has():
    """Imports at the top of modules alone, since only they are loaded with the script."""
    waiting, seen, used = [ROOT / "tests" / "benchmarks" / "gpu.py"], set(), set()
    while waiting:
        seen.add(path := waiting.pop())
        names = list(imports(path, everywhere=False))
        waiting += set(own_files(names)) - seen
        used |= foreign(names)
    assert {"torch", "transformers"} <= used <= BARE
