"""What each rank of test_launchers.py runs: join, tell the others who it is, write what it heard."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import thinwire

with thinwire.init() as world:
    own = torch.tensor([world.rank, world.local_rank, torch.get_num_threads()])
    heard = world.queue.submit("who", lambda channel: channel.all_gather_same(own)).wait()
    report = {
        "launcher": world.place.launcher,
        "size": world.size,
        "host": world.host,
        "hosts": world.hosts,
        "interface": world.interface.name,
        "heard": heard.tolist(),
    }
    (Path(sys.argv[1]) / f"{world.rank}.json").write_text(json.dumps(report))
