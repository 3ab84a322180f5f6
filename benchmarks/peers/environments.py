"""An environment of its own for each peer, with pinned versions, beside the one that thinwire is installed in.

    python benchmarks/peers/environments.py torchft hivemind deepspeed

What a peer needs and this environment has not goes into build/peers/NAME; torch and thinwire are this one's.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

SETUPTOOLS = "84.2.1"
ROOT = Path(__file__).resolve().parent.parent.parent / "build" / "peers"
PACKAGES = {
    "deepspeed": ("deepspeed==0.19.8",),
    "hivemind": ("hivemind==1.1.12",),
    "torchft": ("torchft-nightly==2026.10.26",),
}


class EnvironmentFailedError(RuntimeError):
    """pip cannot install a peer here; the text is what it said."""


def main() -> None:
    for name in sys.argv[1:] or sorted(PACKAGES):
        try:
            print(f"{name}: {python_of(name)}")
        except EnvironmentFailedError as error:
            print(f"{name}: {error}")


def python_of(name: str) -> str:
    """The interpreter of an environment, which is made where it is missing or has other versions.

    Args:
        name: of PACKAGES; "" = the environment that this runs in.
    Raises:
        EnvironmentFailedError: pip fails; it is tried again by the next call.
    """
    if not name:
        return sys.executable
    folder = ROOT / name
    python, stamp = folder / "bin" / "python", folder / "installed"
    wanted = "\n".join([*PACKAGES[name], sys.prefix, ""])
    if stamp.exists() and stamp.read_text() == wanted:
        return str(python)
    _run([sys.executable, "-m", "venv", "--clear", str(folder)], name)
    # addsitedir() and not a plain line, so that editable installs there work here too.
    site = Path(_run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], name).strip())
    above = sysconfig.get_path("purelib")
    (site / "thinwire-main.pth").write_text(f"import site; site.addsitedir({above!r})\n")
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # A new environment's own is too old to build the packages that are no wheels.
    _run([*install, f"setuptools=={SETUPTOOLS}"], name)
    pinned = folder / "constraints.txt"
    pinned.write_text(f"torch=={importlib.metadata.version('torch')}\n")
    # DeepSpeed's set-up looks for torch, which is not in an isolated build.
    _run([*install, "--no-build-isolation", "--constraint", str(pinned), *PACKAGES[name]], name)
    stamp.write_text(wanted)
    return str(python)


def _run(command: list[str], name: str) -> str:
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["pip said nothing"]
        errors = [line for line in lines if line.lower().startswith("error")] or lines[-1:]
        raise EnvironmentFailedError(f"{PACKAGES[name][0]} cannot be installed: {' / '.join(errors)[:400]}")
    return done.stdout


if __name__ == "__main__":
    main()
