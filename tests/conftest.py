"""What every test is held to: it leaves the environment, the process groups and the working folder as it found them."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import given_up_groups
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

torch.set_num_threads(1)  # ranks are threads here: more would only wait for each other on two cores

# Tests of these start many processes, or look for what others might leave behind.
WHOLE_MACHINE = {
    "test_demo",
    "test_doctor",
    "test_faults",
    "test_gossip_processes",
    "test_lab",
    "test_lab_links",
    "test_launchers",
    "test_onebyte_faults",
    "test_own_trainer",
    "test_packaging",
    "test_train_cli",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--mutations",
        type=int,
        default=300,
        metavar="N",
        help="damaged copies of each payload that decoders get to see",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What wants the machine for itself comes first: it takes one of two workers until the end."""
    items.sort(key=lambda item: item.path.stem not in WHOLE_MACHINE)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a file as a whole to one worker, and all that want the machine for themselves to the same."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "whole machine" if Path(file).stem in WHOLE_MACHINE else file

    return ByFile(config, log)


@pytest.fixture
def mutations(request: pytest.FixtureRequest) -> Callable[[Tensor], Iterator[Tensor]]:
    """Makes --mutations damaged copies of a payload, uint8: always the same ones of the same payload."""
    count: int = request.config.getoption("mutations")

    def damaged(payload: Tensor) -> Iterator[Tensor]:
        intact = payload.numpy()
        chance = np.random.default_rng(zlib.crc32(intact.data))
        for number in range(count):
            copy = intact.copy()
            size = copy.size
            places = chance.integers(0, max(size, 1), int(chance.integers(1, 5)) if size else 0)
            sort = number % 8
            if sort < 3:
                copy[places] ^= np.uint8(1) << chance.integers(0, 8, places.size, dtype=np.uint8)
            elif sort == 3:
                copy[places] = chance.choice(np.array([0x00, 0x7F, 0x80, 0xFF], np.uint8), places.size)
            elif sort == 4:
                copy[: min(size, 16)] = chance.integers(0, 256, min(size, 16), dtype=np.uint8)
            elif sort == 5:
                copy = copy[: int(chance.integers(0, max(size, 1)))]
            elif sort == 6:
                copy = np.concatenate([copy, chance.integers(0, 256, int(chance.integers(1, 9)), dtype=np.uint8)])
            else:
                copy = chance.integers(0, 256, int(chance.integers(0, 2 * size + 2)), dtype=np.uint8)
            yield torch.from_numpy(copy)

    return damaged


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder benchmarks/, whose modules can be imported meanwhile and are forgotten afterwards."""
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in set(sys.modules) - before:
        if name in sys.modules and str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture(autouse=True, scope="session")
def knows_what_was_given_up() -> Iterator[None]:
    with given_up_groups.remembered():
        yield


@pytest.fixture(autouse=True)
def leaves_nothing_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    environment = dict(os.environ)
    folder = Path.cwd()
    present = {path.name for path in folder.iterdir()}
    threads = torch.get_num_threads()
    yield
    given_up_groups.end_given_up()
    changed = {k for k in {*environment, *os.environ} if environment.get(k) != os.environ.get(k)}
    changed -= {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}  # pytest's and torch's own doing
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    # Ranks that are threads set and reset this in any order: what stays makes Dynamo compile for a DDP that is gone.
    DistributedDataParallel._active_ddp_module = None
    assert not changed, f"the test changed the environment: {sorted(changed)}"
    assert not torch.distributed.is_initialized(), "the test left a default process group behind"
    assert Path.cwd() == folder, "the test changed the working folder"
    new = {path.name for path in folder.iterdir()} - present
    new -= {"build", ".hypothesis", ".mypy_cache", ".ruff_cache", ".pytest_cache", "thinwire.egg-info"}
    assert not new, f"the test left files behind: {sorted(new)}"
