"""The structure: which folder imports which, how long files are, what every public name has."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import deepseek_v3

PACKAGE = Path(deepseek_v3.__file__).parent
ALLOWED = {
    "configuration": {"configuration"},
    "kernels": {"kernels"},
    "quantization": {"quantization", "configuration", "kernels", "conversion"},
    "modeling_deepseek_v3": {"modeling_deepseek_v3", "configuration", "kernels", "quantization", "generation"},
    "generation": {"generation", "modeling_deepseek_v3"},
    "conversion": {"conversion", "configuration", "kernels"},
    "training": {"training", "modeling_deepseek_v3", "configuration", "kernels", "quantization", "generation"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(file):
    """(module parts below the package) of every import of our own in `file`."""
    here = file.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1]
            yield (*base, *(node.module or "").split("."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deepseek_v3":
            yield tuple(node.module.split(".")[1:])
        elif isinstance(node, ast.Import):
            yield from (tuple(a.name.split(".")[1:]) for a in node.names if a.name.split(".")[0] == "deepseek_v3")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_folders_import_downwards_only(file):
    parts = file.relative_to(PACKAGE).parts
    if len(parts) == 1:
        return  # the package's root names things and may import everything
    folders = {target[0] for target in imported(file) if target and (PACKAGE / target[0]).is_dir()}
    assert folders <= ALLOWED[parts[0]], f"{file} imports {folders - ALLOWED[parts[0]]}"
    assert not any(target == () or target == ("",) for target in imported(file)), f"{file} imports the root"


def test_heads_alone_import_generation_and_generation_only_the_cache():
    """The mixin stands between the cache and the heads."""
    model = [f for f in FILES if f.parent.name == "modeling_deepseek_v3"]
    users = {f.name for f in model for target in imported(f) if target[:1] == ("generation",)}
    assert users == {"heads.py"}
    mixin = [f for f in FILES if f.parent.name == "generation"]
    used = {target for f in mixin for target in imported(f) if target[:1] == ("modeling_deepseek_v3",)}
    assert used == {("modeling_deepseek_v3", "cache")}


def test_kernels_import_neither_transformers_nor_triton_at_import():
    for file in FILES:
        if file.parent.name in ("kernels", "reference"):
            tree = ast.parse(file.read_text())
            top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            names = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
            names |= {n.module or "" for n in top if isinstance(n, ast.ImportFrom) and not n.level}
            assert not {name for name in names if name.split(".")[0] in ("transformers", "triton")}, file


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_are_short_and_say_what_they_are(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 450
    assert ast.get_docstring(ast.parse(text)) or not text.strip()


def test_public_names_exist_and_have_docstrings():
    for name in deepseek_v3.__all__:
        value = getattr(deepseek_v3, name)
        assert inspect.getdoc(value), name


def test_tables_are_drawn_from_recorded_results():
    script = PACKAGE.parent / "benchmarks" / "tables.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
