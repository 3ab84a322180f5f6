"""Which benchmarks there are, and with which arguments `make bench` and `make bench-quick` run them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Script:
    """One benchmark.

    arguments: of `make bench`; OUT stands for the folder of the results. limit_s: seconds until it is stopped there,
    beside those that earlier scripts have left.
    quick: of `make bench-quick`; None = not a part of it. plots: whether it takes --plot.
    """

    name: str
    arguments: tuple[str, ...]
    limit_s: float
    quick: tuple[str, ...] | None = None
    quick_limit_s: float = 0.0
    plots: bool = False


RUNS, PROBES = "OUT/kept/runs.json", "OUT/kept/probes"  # which several share
OWN_RUNS = ("--keep", "OUT/kept/plan_runs.json")  # made between the probes
ONE_THREAD = ("--threads", "1", "--repeats", "5")
ONE_THREAD_QUICK = ("--threads", "1", "--repeats", "2")
# Not hivemind, whose steps would take ten minutes of the hour, and of four stages of ZeRO two.
FITTING = ("thinwire", "torch", "plain", "ZeRO-0", "ZeRO-3")
SCRIPTS = (
    # The headline, and the system as a whole. The losses are those that the repository has, the seconds are new.
    Script(
        "time_to_loss",
        ("--keep", RUNS, "--rates", "100mbit", "--timed", "3", "--only", *FITTING),
        1050,
        ("--keep", RUNS, "--rates", "100mbit", "--timed", "3", "--only", "low rank 16", "PowerSGD"),
        110,
        plots=True,
    ),
    Script(
        "plan_accuracy",
        (
            *OWN_RUNS,
            "--probes",
            PROBES,
            "--rates",
            "100mbit",
            "--ranks-per-host",
            "1",
            "--only",
            "thinwire int8",
        ),
        155,
        plots=True,
    ),
    Script("plan_recommendation", ("--keep", RUNS, "--probes", PROBES, "--rates", "100mbit"), 55),
    Script(
        "scaling",
        ("--keep", "OUT/kept/scaling.json", "--timed", "3", "--hosts", "1", "4", "--only", "low rank"),
        360,
        plots=True,
    ),
    Script("two_shot", ("--repeats", "2", "--most", "0.6"), 105),
    Script("queue_overhead", ("--repeats", "5"), 55),
    Script("lab_accuracy", ("--repeats", "2"), 70, ("--repeats", "1"), 60),
    Script("fault_detection", (), 65),
    # Compression.
    Script("payload_bytes", ("--steps", "10"), 25),
    Script("quantised_allreduce_error", (), 15, (), 30),
    Script("ef21_w", ("--workers", "200"), 15),
    Script("encode_speed", ONE_THREAD, 25),
    # Gossip.
    Script("gossip_faults", ("--rounds", "20"), 30),
    Script("gossip_graphs", ("--trials", "2"), 35),
    Script("gossip_acid", ("--machines", "16", "--seeds", "1"), 15, ("--machines", "16", "--seeds", "1"), 30),
    Script("gossip_bytes", (), 60),
    Script("gossip_single_merge", ("--seeds", "1", "--only", "mixture-16"), 65, plots=True),
    Script(
        "gossip_straggler",
        ("--hosts", "4", "--steps", "10", "--gossip-steps", "40", "--timed", "1", "--step", "0.2", "--only", "AD-PSGD"),
        185,
        plots=True,
    ),
    Script("gossip_mix", ONE_THREAD, 20, ONE_THREAD_QUICK, 15),
    # Sharding.
    Script("partition_bytes", ("--hosts", "2", "--micro-batches", "1", "--only", "thinwire"), 45, plots=True),
    Script("partition_difference", ("--steps", "40"), 80, plots=True),
    Script("simulate_frontier", ("--models", "20 B", "--micro-batches", "1", "--no-triples"), 25, plots=True),
    Script("simulate_calibration", ("--steps", "5"), 120, plots=True),
    Script("partition_memory", ("--triples", "rank,rank,world", "node,node,world"), 70, plots=True),
    Script("partition_throughput", ("--rates", "100mbit", "--timed", "2"), 185, plots=True),
    # Mixtures of experts.
    Script("balance_overhead", ("--gradients", "none", "--rounds", "3", "--seldom", "2"), 140, plots=True),
    Script("balance_specialisation", ("--ways", "micro", "global", "--seeds", "0", "--steps", "40"), 40, plots=True),
    # One byte.
    Script("onebyte_convergence", ("--rounds", "300", "--seeds", "1"), 25),
    Script("onebyte_faults", ("--calm", "5"), 65),
    Script("onebyte_finetune", ("--only", "gpt", "--share", "0.05"), 145, plots=True),
    Script("onebyte_replay", ("--rounds", "1000", "--stepped", "50", "--seeds", "3"), 20),
    Script("onebyte_scale", ("--rounds", "200"), 35),
    Script("onebyte_step", ("--repeats", "2"), 110),
    # Kernels.
    Script("cast_reduce", ONE_THREAD, 15, ONE_THREAD_QUICK, 15),
    Script("quantize", ONE_THREAD, 30),
    Script("block_payload", (*ONE_THREAD, "--numel", "4194304"), 15),
    Script("lattice_add", (*ONE_THREAD, "--elements", "4194304"), 15),
    Script("router", ONE_THREAD, 15, ONE_THREAD_QUICK, 30),
)

PARTS = {
    "balance_overhead_host": "a rank of balance_overhead.py",
    "balance_overhead_ways": "part of balance_overhead.py",
    "balance_specialisation_plot": "part of balance_specialisation.py",
    "balance_specialisation_run": "part of balance_specialisation.py",
    "gossip_straggler_host": "a rank of gossip_straggler.py",
    "gossip_tasks": "what the machines of gossip's benchmarks learn",
    "lab_machine": "part of lab_runs.py",
    "lab_phases": "part of lab_runs.py",
    "lab_runs": "runs that several benchmarks compare",
    "partition_host": "a rank of the benchmarks of partition",
    "partition_lab": "part of the benchmarks of partition",
    "run_all": "runs the others",
    "run_all_scripts": "part of run_all.py",
    "runner": "part of all",
    "steps_factor": "makes the table of steps that `thinwire plan` reads, of what time_to_loss.py has measured",
    "stdlib_texts": "texts of onebyte_finetune.py",
    "time_to_loss_plot": "part of time_to_loss.py",
    "time_to_loss_ways": "part of time_to_loss.py",
}
"""Files that are no benchmark by themselves, and what they are for."""
