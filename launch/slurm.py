"""Slurm's notations: node lists, tasks per node, steps. Asks no Slurm command, so it also works inside containers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping

# Steps that Slurm makes by itself (batch script, interactive shell of salloc, ...) are numbered from here.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
_MAX_NODES = 1 << 16
# Below the ports that systems hand out by themselves (from 32768), above those that services like (Slurm's: 68xx).
_FIRST_PORT, _PORTS = 10007, 19997  # a prime number of ports: neighbouring jobs spread over all of them
_PORTS_PER_JOB = 131


def is_step(environ: Mapping[str, str]) -> bool:
    """Whether srun has started this process as a task, in contrast to a batch script or a shell of salloc."""
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", ""))
    return "SLURM_PROCID" in environ and step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP


def expand_nodelist(text: str) -> list[str]:
    """Host names of a compressed list: "node[01-03,7],gpu-a" is node01, node02, node03, node7, gpu-a.

    Raises:
        ValueError: the text is no node list.
    """
    all_names = (name for item in _split(text) for name in _expand(item))
    names = list(itertools.islice(all_names, _MAX_NODES + 1))
    if not names or len(names) > _MAX_NODES:
        raise ValueError(f"{text!r} names no node, or more than {_MAX_NODES}")
    return names


def expand_tasks_per_node(text: str) -> list[int]:
    """Tasks on each node: "2(x3),1" is 2, 2, 2, 1.

    Raises:
        ValueError: the text is no such list.
    """
    tasks: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item.strip())
        if match is None or int(match[2] or 1) > _MAX_NODES:
            raise ValueError(f"{item!r} is not of the form 2 or 2(x3)")
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def rendezvous_port(job_id: int, step_id: int) -> int:
    """A port for one step: equal on all its ranks, different for the first 131 steps of one job."""
    return _FIRST_PORT + (job_id * _PORTS_PER_JOB + step_id) % _PORTS


def _split(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    items, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if depth not in (0, 1):
            raise ValueError(f"{text!r} has brackets that do not match")
        if character == "," and depth == 0:
            items.append(text[start:at])
            start = at + 1
    if depth:
        raise ValueError(f"{text!r} has brackets that do not match")
    items.append(text[start:])
    if not all(item.strip() for item in items):
        raise ValueError(f"{text!r} has an empty name")
    return [item.strip() for item in items]


def _expand(item: str) -> Iterator[str]:
    """Expand the brackets of one name; several of them multiply, the last one running fastest."""
    parts = re.split(r"\[([^\]]*)\]", item)  # text, ranges, text, ranges, ..., text
    choices = [_numbers(part) if at % 2 else [part] for at, part in enumerate(parts)]
    return ("".join(chosen) for chosen in itertools.product(*choices))


def _numbers(ranges: str) -> list[str]:
    numbers: list[str] = []
    for item in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item.strip())
        if match is None:
            raise ValueError(f"[{ranges}] is not of the form [01-03,7]")
        first, last = match[1], match[2] or match[1]
        if not 0 <= int(last) - int(first) < _MAX_NODES:
            raise ValueError(f"[{ranges}] counts backwards or too far")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers
