"""What pip installs: a wheel that holds thinwire alone, from the clone and from the sdist, and works elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import thinwire

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 120
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv*", "build", "runs", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
)


def run(*command: str | Path, folder: Path) -> str:
    """Output of a command that runs elsewhere and sees neither the clone nor a launcher."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel of a clean copy of the clone; under again/ the wheel made of the sdist."""
    folder = tmp_path_factory.mktemp("packaging")
    clone = folder / "clone"
    shutil.copytree(ROOT, clone, symlinks=True, ignore=NOT_SOURCE)
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--wheel", "--outdir", folder, clone, folder=folder)
    (sdist,) = folder.glob("*.tar.gz")
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder / "again", sdist, folder=folder)
    return folder


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_thinwire_alone(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"thinwire-{thinwire.__version__}-py3-none-any.whl"
    top = {name.split("/")[0] for name in names_in(wheel)}
    assert top == {"thinwire", f"thinwire-{thinwire.__version__}.dist-info"}


def test_wheel_holds_everything(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = {name for name in names_in(wheel) if name.startswith("thinwire/")}
    sources = {
        f"thinwire/{path.relative_to(ROOT).as_posix()}"
        for folder in ("comm", "dist", "kernels", "launch", "configs")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml")
    }
    assert names == sources | {"thinwire/__init__.py", "thinwire/__main__.py", "thinwire/py.typed"}
    assert any(name.endswith(".yaml") for name in names)


def test_sdist_makes_the_same_wheel(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    (again,) = (built / "again").glob("*.whl")
    assert names_in(again) == names_in(wheel)


def test_sdist_is_a_whole_clone(built: Path) -> None:
    """Tests and benchmarks are in it too, with what they need; links became real files."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
        assert not [member.name for member in archive if member.issym() and Path(member.linkname).is_absolute()]
    for name in ("LICENSE", "README.md", "pyproject.toml", "tests/test_packaging.py", "tests/ranks.py"):
        assert name in inside


def test_installed_wheel_works_elsewhere(built: Path, tmp_path: Path) -> None:
    """In an environment that has the dependencies, by a path to the running one's, and no other thinwire."""
    (wheel,) = built.glob("*.whl")
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    binaries = environment / "bin"
    paths = {"base": str(environment), "platbase": str(environment)}
    own = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    # A plain path: the editable thinwire there comes by a .pth file, which is not followed from here.
    (own / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    options = ["--no-deps", "--no-index", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "--python", binaries / "python", "install", *options, wheel, folder=tmp_path)

    assert "Train neural networks" in run(binaries / "thinwire", "--help", folder=tmp_path)
    assert run(binaries / "thinwire", "--version", folder=tmp_path).strip() == f"thinwire {thinwire.__version__}"
    modules = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in names_in(wheel)
        if name.startswith("thinwire/") and name.endswith(".py") and not name.endswith("__main__.py")
    )
    program = "import importlib, sys\nfor name in sys.argv[1:]: print(importlib.import_module(name).__file__)"
    files = run(binaries / "python", "-c", program, *modules, folder=tmp_path).splitlines()
    assert len(files) == len(modules)
    assert [file for file in files if not file.startswith(str(own))] == []
