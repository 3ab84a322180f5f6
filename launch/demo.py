"""`thinwire demo`: the same GPT trained by each method on four emulated hosts, and what each cost.

Imports no torch: the ranks are processes of their own.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from thinwire.comm.units import format_rate
from thinwire.launch.lab import Lab, LabError, why_not
from thinwire.launch.report.loss_curves import draw_curves
from thinwire.launch.report.outcome import RunOutcome, outcome_of
from thinwire.launch.report.run import read_run, with_modelled_link
from thinwire.launch.report.table import print_table


@dataclass(frozen=True)
class Variant:
    """One run of the demo: a label for the table, and the settings that make it differ from its file in configs/.

    note: what a reader of the table must know to compare it with the others.
    """

    label: str
    overrides: tuple[str, ...]
    config: str = "demo.yaml"
    note: str = ""


_LOW_RANK = "method={kind: compress, compressor: {kind: lowrank, rank: 16, dtype: bf16}, clip: after}"
_SPARSELOCO = (
    "method={kind: local_sgd, every: ROUND, outer: {kind: sgd, lr: 1.0}, feedback: {kind: ef, decay: 0.95}, "
    "compressor: {kind: topk, k: 64, chunk: 4096, values: 2bit}, collective: contributor_mean}"
)
_ROUND = 8  # local steps of a round, or fewer where they do not divide the steps of the run

# A method that lands adds its line here.
VARIANTS = (
    Variant("all-reduce fp32", ("method.dtype=fp32",)),
    Variant("all-reduce bf16", ("method.dtype=bf16",)),
    Variant("low rank 16", (_LOW_RANK,)),
    Variant("SparseLoCo", (_SPARSELOCO,)),
    Variant("partition, 4 bits", (), "demo_partition.yaml"),
    Variant("gossip, one merge", (), "demo_gossip.yaml"),
    Variant(
        "experts, balanced",
        (),
        "demo_moe.yaml",
        note="another model: a token meets as many weights, out of three times as many; gradients in 4 bits",
    ),
    Variant(
        "one byte, after fp32",
        ("checkpoint.resume=FOLDER/all-reduce-fp32/checkpoints",),
        "demo_onebyte.yaml",
        note="begins with the weights at which the first run has ended",
    ),
)


def demo(*, hosts: int, rate_bps: float, steps: int | None, folder: Path) -> int:
    """Train every variant, print the table, save the plot; returns the exit code of `thinwire demo`.

    On a machine that forbids network namespaces the same ranks run as plain processes, and the table says that its
    link times are computed: bytes sent * 8 / rate, overlapping with nothing.

    Args:
        hosts: emulated hosts, one rank each.
        rate_bps: rate of each host's link, in bits per second.
        steps: optimizer steps of each run; default: those of configs/demo.yaml.
        folder: receives one run folder per variant, and loss.png. What an earlier demo left there is replaced.
    """
    obstacle = why_not()
    if obstacle:
        print(
            f"This machine cannot emulate hosts: {obstacle}\n"
            f"So the {hosts} ranks run as plain processes on an unlimited loopback. The table computes what a "
            f"{format_rate(rate_bps)} link would have added.\n"
        )
    outcomes: list[RunOutcome] = []
    for variant in VARIANTS:
        name = re.sub("[^A-Za-z0-9]+", "-", variant.label)
        shutil.rmtree(folder / name, ignore_errors=True)
        print(f"\n--- {variant.label} " + "-" * (60 - len(variant.label)), flush=True)
        with as_file(files("thinwire.configs") / variant.config) as config:
            command = _command(config, variant, hosts, steps, folder, name)
            try:
                code = _run_plainly(command, hosts) if obstacle else _run_in_lab(command, hosts, rate_bps)
            except LabError as error:
                print(f"thinwire demo: {error}", file=sys.stderr)
                return 3
        if code:
            print(f"thinwire demo: the run {variant.label!r} failed, its messages are above", file=sys.stderr)
            return code
        trained = read_run(folder / name, variant.label)
        outcomes.append(outcome_of(with_modelled_link(trained, rate_bps) if obstacle else trained))
    print()
    print_table(
        outcomes, title=f"{hosts} hosts, {format_rate(rate_bps)} each" + (", link modelled" if obstacle else "")
    )
    for variant in VARIANTS:
        if variant.note:
            print(f"{variant.label}: {variant.note}")
    draw_curves(outcomes, folder / "loss.png", title=f"GPT on {hosts} hosts joined by {format_rate(rate_bps)}")
    print(f"\nloss against seconds: {folder / 'loss.png'}; every step: {folder}/*/metrics.jsonl")
    print(f"where the time and the bytes went: thinwire report {folder}/*/")
    return 0


def _command(config: Path, variant: Variant, hosts: int, steps: int | None, folder: Path, name: str) -> list[str]:
    threads = max(1, (os.cpu_count() or 1) // hosts)  # the hosts share this machine's cores
    local_steps = math.gcd(_ROUND, steps or _ROUND)
    filled_in = (override.replace("ROUND", str(local_steps)) for override in variant.overrides)
    overrides = [override.replace("FOLDER", str(folder)) for override in filled_in]
    settings = [f"output.folder={folder}", f"name={name}", f"world.threads={threads}", *overrides]
    if steps is not None:
        settings.append(f"train.steps={steps}")
    return [sys.executable, "-m", "thinwire", "train", str(config), *settings]


def _run_in_lab(command: list[str], hosts: int, rate_bps: float) -> int:
    with Lab(hosts=hosts, rate_bps=rate_bps) as lab:
        run = lab.start(command, output="rank0")
        try:
            code = run.wait()
        except KeyboardInterrupt:
            run.stop()
            raise
        for line in run.report():
            print(line, file=sys.stderr)
        return code


def _run_plainly(command: list[str], hosts: int) -> int:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={hosts}"]
    return subprocess.run([*launcher, *command[1:]], check=False).returncode
