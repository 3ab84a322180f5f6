"""What each rank of test_launchers.py runs: join, tell the others who it is, write what it heard.

    python report_place.py FOLDER [RANK]

RANK then leaves with an error, while the others wait for it.
"""

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
    if len(sys.argv) > 2:
        # A launcher may kill the others at once: not before all have written.
        world.queue.submit("written", lambda channel: channel.all_gather_same(own)).wait()
        if world.rank == int(sys.argv[2]):
            raise OSError("the disk is full")
        world.queue.submit("wait", lambda channel: channel.all_gather_same(own)).wait()
