"""`thinwire onebyte replay`, `verify` and `inspect`. Only what works on weights imports torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from thinwire.comm.onebyte.log import Log, LogError
from thinwire.launch.complaint import complain

if TYPE_CHECKING:
    from torch import Tensor

    from thinwire.comm.onebyte.replay import Replayed
    from thinwire.dist.base_model import BaseModel

FAILURE = 1
USER_ERROR = 2
INTERRUPTED = 130


def replay(
    path: Path, base: Path, out: Path, *, until: int | None = None, step_by_step: bool = False, device: str = "cpu"
) -> int:
    """Write the weights that a log makes of a base; returns the exit code: 0, 2 for the user's mistake, 1 else."""

    def work() -> int:
        from thinwire.comm.onebyte.replay import replay as run
        from thinwire.dist.checkpoint_export import export_safetensors

        if out.suffix != ".safetensors":
            return complain(f"--out {out}: give a name that ends with .safetensors", USER_ERROR)
        with Log.open(path, read_only=True) as log:
            model, weights = _open_base(log, base, device)
            began = time.monotonic()
            with _progress(log.rounds if until is None else until) as progress:
                found = run(log, weights, until=until, step_by_step=step_by_step, progress=progress)
            took_s = time.monotonic() - began
        tensors, ties = model.replaced(found.tensors)
        facts = {"onebyte": f"rounds {found.rounds}, model {found.model_hash.hex()}"}  # one entry: their order varies
        export_safetensors(tensors, out, facts)
        for other, name in sorted(ties.items()):
            print(f"{other} was equal to {name} in the base, and follows it as a tied weight")
        print(f"{out}: {len(tensors)} tensors, {len(found.tensors)} of them trained, after {found.rounds} rounds")
        print(f"{_hash_line(found)}; replayed in {took_s:.1f} s")
        return 0

    return _run(work)


def verify(path: Path, base: Path | None, *, device: str = "cpu") -> int:
    """Check a log's chain, and with the base the weights at every snapshot; returns the exit code."""

    def work() -> int:
        with Log.open(path, read_only=True) as log:
            _print_torn(log)
            print(f"{path}: all {len(log)} records are sound, {log.rounds} rounds; chain {log.chain(len(log)).hex()}")
            if base is None:
                print("the weights were not computed; give --base MODEL to compare them with the log's snapshots")
                return 0
            from thinwire.comm.onebyte.replay import verify as run

            _, weights = _open_base(log, base, device)
            with _progress(log.rounds) as progress:
                found = run(log, weights, progress=progress)
        print(_hash_line(found))
        return 0

    return _run(work)


def inspect(path: Path, as_json: bool) -> int:
    """Print what a log says of its run; returns the exit code."""

    def work() -> int:
        from thinwire.comm.onebyte.manifest import Manifest
        from thinwire.comm.onebyte.summary import summarize
        from thinwire.launch.onebyte_report import print_json, print_summary

        with Log.open(path, read_only=True) as log:
            try:
                manifest = Manifest.from_bytes(log.manifest)
            except ValueError as error:
                return complain(f"{path}: this thinwire cannot read its manifest: {error}", USER_ERROR)
            summary = summarize(log, manifest)
        (print_json if as_json else print_summary)(summary, sys.stdout)
        return 0

    return _run(work)


def _open_base(log: Log, base: Path, device: str) -> tuple[BaseModel, dict[str, Tensor]]:
    """The base, and its trained tensors on a device."""
    import torch

    from thinwire.comm.onebyte.replay import manifest_of
    from thinwire.dist.base_model import BaseModelError, open_base

    model = open_base(base, manifest_of(log).tensors)
    try:
        return model, {name: tensor.to(device) for name, tensor in model.trained().items()}
    except (RuntimeError, AssertionError) as error:
        usable = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise BaseModelError(f"--device {device}: {error}; usable here: {', '.join(usable)}") from None


def _hash_line(found: Replayed) -> str:
    if found.proved:
        proof = f"a snapshot in the log confirms the weights after {found.proved} rounds"
    else:
        proof = "no snapshot in the log confirms it"
    return f"SHA-256 of the weights on their grids after {found.rounds} rounds: {found.model_hash.hex()}; {proof}"


def _print_torn(log: Log) -> None:
    if log.torn_bytes:
        print(f"{log.path}: the last {log.torn_bytes} bytes are a record that its writer did not finish; ignored")


@contextmanager
def _progress(rounds: int) -> Iterator[Callable[[int], None] | None]:
    """A bar where there is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    bar = Progress("rounds", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True))
    with bar:
        task = bar.add_task("rounds", total=rounds)
        yield lambda done: bar.update(task, completed=done)


def _run(work: Callable[[], int]) -> int:
    try:
        return work()
    except LogError as error:
        return complain(error, FAILURE)
    except OSError as error:
        return complain(f"{error.filename}: {error.strerror}" if error.filename else error, USER_ERROR)
    except (ValueError, ArithmeticError) as error:
        from thinwire.comm.onebyte.errors import WeightRangeError
        from thinwire.comm.onebyte.replay import ReplayError, WrongWeightsError
        from thinwire.dist.base_model import BaseModelError

        if isinstance(error, WrongWeightsError | WeightRangeError):
            return complain(error, FAILURE)
        if isinstance(error, ReplayError | BaseModelError):
            return complain(error, USER_ERROR)
        raise
    except KeyboardInterrupt:
        return complain("interrupted", INTERRUPTED)
