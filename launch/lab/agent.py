"""What mpirun runs in place of ssh to reach a host of the lab: it asks the guardian, which needs no server on the host.

agent LAB_ID [OPTIONS OF SSH] HOST COMMAND...     (a script that mpi.py writes)
"""

from __future__ import annotations

import os
import sys

from thinwire.launch.lab.control import connect
from thinwire.launch.lab.spec import LabError, host_number


def main() -> int:
    """Run the command with this process's standard streams, and return its exit code."""
    lab_id, *words = sys.argv[1:]
    while words and words[0].startswith("-"):
        words.pop(0)
    try:
        host, *command = words
        connection = connect(lab_id)
        request = {
            "do": "start",
            "host": host_number(host),
            "command": ["/bin/sh", "-c", " ".join(command)],  # the far side of ssh, too, is a shell
            "env": dict(os.environ),
            "folder": os.getcwd(),
            "whole_host": True,
        }
        message = connection.request(request, [0, 1, 2])
        while "ended" not in message:
            message = connection.next_answer()
    except (LabError, ValueError) as error:
        print(f"thinwire lab: the launch agent of mpirun failed ({' '.join(words)}): {error}", file=sys.stderr)
        return 1
    code: int = message["code"]
    return code if code >= 0 else 128 - code
