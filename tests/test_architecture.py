"""The house rules of the layout: who may import whom, what has no __init__.py, what starts without torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Each folder may import itself and those after it; benchmarks and tests may import all.
LAYERS = ("launch", "dist", "comm", "kernels")
FOLDERS = (*LAYERS, "configs")
SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
EVERYTHING = sorted({*SOURCES, *(p for f in ("thinwire", "benchmarks", "tests") for p in (ROOT / f).rglob("*.py"))})

# Only launch/env.py reads the environment. These touch it otherwise, and why:
ENVIRONMENT = {
    "launch/env.py": "reads the launcher's variables",
    "launch/lab/": "hands its environment on to the processes that it starts",
    "dist/engine/deepspeed.py": "tells DeepSpeed its local rank, which has no other way in",
    "dist/world.py": "tells gloo its interface, which has no other way in",
}
MAX_LINES = 600


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file imports anywhere in it, functions included, with the line."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import; write thinwire...."
            assert node.module is not None
            # `from thinwire import dist` names a module by its last part.
            from_root = node.module == "thinwire"
            yield from ((node.lineno, f"{node.module}.{a.name}" if from_root else node.module) for a in node.names)


def test_there_is_something_to_check() -> None:
    assert {name_of(path).split("/")[0] for path in SOURCES} == set(LAYERS)


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_one_way(layer: str) -> None:
    above = LAYERS[: LAYERS.index(layer)]
    wrong = [
        f"{name_of(path)}:{line} imports {module}"
        for path in (ROOT / layer).rglob("*.py")
        for line, module in imports(path)
        if module.startswith(tuple(f"thinwire.{other}" for other in above))
    ]
    assert not wrong, f"{layer} may import only {', '.join(LAYERS[LAYERS.index(layer) :])}: {wrong}"


def test_no_bare_imports_of_the_source_folders() -> None:
    wrong = [
        f"{name_of(path)}:{line} imports {module}"
        for path in EVERYTHING
        for line, module in imports(path)
        if module.split(".")[0] in FOLDERS
    ]
    assert not wrong, f"write thinwire.comm..., because a bare comm is another package: {wrong}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_source_folders_are_no_packages_of_their_own(folder: str) -> None:
    """With an __init__.py, the clone on sys.path would shadow Jupyter's comm and Hugging Face's kernels."""
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("layer", LAYERS)
def test_packages_inside_the_source_folders_have_an_init(layer: str) -> None:
    lacking = {
        name_of(path.parent)
        for path in (ROOT / layer).rglob("*.py")
        if path.parent != ROOT / layer and not (path.parent / "__init__.py").exists()
    }
    assert not lacking


@pytest.mark.parametrize("folder", FOLDERS)
def test_links_are_relative(folder: str) -> None:
    link = ROOT / "thinwire" / folder
    assert link.is_symlink(), f"{link} is no link: git needs core.symlinks=true where this was cloned"
    assert os.readlink(link) == f"../{folder}"


def test_one_reader_of_the_environment() -> None:
    wrong = []
    for path in SOURCES:
        if name_of(path).startswith(tuple(ENVIRONMENT)):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [node.attr]
                if isinstance(node, ast.Attribute)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.ImportFrom) and node.module == "os"
                else []
            )
            if {"environ", "getenv", "environb", "expandvars"} & set(names):
                wrong.append(f"{name_of(path)}:{getattr(node, 'lineno', 0)}")
    assert not wrong, f"environment variables are read in launch/env.py alone: {wrong}"


def test_files_say_what_they_hold() -> None:
    vague = {"utils.py", "util.py", "helpers.py", "helper.py", "common.py", "manager.py", "misc.py"}
    assert not [name_of(path) for path in EVERYTHING if path.name in vague]
    # An empty __init__.py or one that only re-exports needs no words.
    silent = [
        name_of(path)
        for path in SOURCES
        if path.name != "__init__.py" and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent, f"no first line that says what the file is: {silent}"


def test_no_file_is_a_book() -> None:
    long = {name_of(path): n for path in EVERYTHING if (n := len(path.read_text().splitlines())) > MAX_LINES}
    assert not long


def run_python(*arguments: str) -> str:
    """What a fresh interpreter prints that finds thinwire in this clone, installed or not."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, check=True, capture_output=True, text=True, timeout=60
    ).stdout


HEAVY = "[name for name in ('torch', 'triton', 'numpy', 'matplotlib', 'mpi4py') if name in sys.modules]"


@pytest.mark.parametrize(
    "start",
    [
        "import thinwire",
        "import thinwire.launch.env; thinwire.launch.env.detect({})",
        "import runpy\ntry: sys.argv = ['thinwire', '--help']; runpy.run_module('thinwire', run_name='__main__')"
        "\nexcept SystemExit as end: assert not end.code",
    ],
    ids=["import", "detect", "help"],
)
def test_starts_without_torch(start: str) -> None:
    assert run_python("-c", f"import sys\n{start}\nprint({HEAVY})").splitlines()[-1] == "[]"


def test_public_names_exist() -> None:
    assert (
        run_python("-c", "import thinwire; [getattr(thinwire, n) for n in thinwire.__all__]; print('all')") == "all\n"
    )


def test_clone_on_the_path_shadows_no_other_package(tmp_path: Path) -> None:
    """In the root of the clone, `import comm` must find Jupyter's comm where it is installed."""
    (tmp_path / "comm").mkdir()
    (tmp_path / "comm" / "__init__.py").write_text("jupyter = True\n")
    program = (
        f"import sys; sys.path[:] = [{str(ROOT)!r}, *sys.path, {str(tmp_path)!r}]; import comm; print(comm.jupyter)"
    )
    assert run_python("-c", program) == "True\n"
