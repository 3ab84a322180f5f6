"""What every test is held to: it leaves the environment, the process groups and the working folder as it found them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # ranks are threads here: more would only wait for each other on two cores


@pytest.fixture(autouse=True)
def leaves_nothing_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    environment = dict(os.environ)
    folder = Path.cwd()
    present = {path.name for path in folder.iterdir()}
    threads = torch.get_num_threads()
    yield
    changed = {k for k in {*environment, *os.environ} if environment.get(k) != os.environ.get(k)}
    changed -= {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}  # pytest's and torch's own doing
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    assert not changed, f"the test changed the environment: {sorted(changed)}"
    assert not torch.distributed.is_initialized(), "the test left a default process group behind"
    assert Path.cwd() == folder, "the test changed the working folder"
    new = {path.name for path in folder.iterdir()} - present
    new -= {"build", ".hypothesis", ".mypy_cache", ".ruff_cache", ".pytest_cache", "thinwire.egg-info"}
    assert not new, f"the test left files behind: {sorted(new)}"
