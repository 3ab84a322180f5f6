"""What time_to_loss.py compares: thinwire's methods, and the peers that install from wheels and run on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

from lab_runs import Way


@dataclass(frozen=True)
class Contender(Way):
    """A way with what must be known to compare it.

    dense_steps: first steps that exchange as fp32 DDP does, and global averages at the end: charged as such steps.
    trains_as: the label of a way whose losses these must be, to rounding; then they are not trained to the end.
    """

    dense_steps: int = 0
    trains_as: str = ""


DDP = "torch DDP, fp32"
EVERY = 10  # local steps of a round, here and in peers/peer.py


def compress(compressor: str) -> tuple[str, ...]:
    """Settings of `method: compress`. The trainer clips the mean, as torch's DDP does, so that sending can overlap."""
    return (f"method={{kind: compress, compressor: {compressor}, clip: after}}",)


PARTITION = "method={kind: partition, params: rank, grads: rank, optim: world"
OURS = (
    Contender("thinwire all-reduce, bf16", ("method.dtype=bf16",)),
    Contender("thinwire int8", compress("int8")),
    Contender("thinwire int4", compress("int4")),
    Contender("thinwire low rank 16", compress("{kind: lowrank, rank: 16, dtype: bf16}")),
    Contender("thinwire low rank 4", compress("{kind: lowrank, rank: 4, dtype: bf16}")),
    Contender("thinwire top-k 1 %, int8", compress("{kind: topk, density: 0.01, values: int8}")),
    Contender(
        "thinwire DiLoCo, every 10",
        (f"method={{kind: local_sgd, every: {EVERY}, outer: nesterov, compressor: bf16}}",),
        period=EVERY,
    ),
    Contender(
        "thinwire SparseLoCo, every 10",
        (
            f"method={{kind: local_sgd, every: {EVERY}, outer: {{kind: sgd, lr: 1.0}}, feedback: {{kind: ef, decay: "
            "0.95}, compressor: {kind: topk, k: 64, chunk: 4096, values: 2bit}, collective: contributor_mean}",
        ),
        period=EVERY,
    ),
    Contender(
        "thinwire gossip, pairs every 4",
        (
            "method={kind: gossip, graph: matching, schedule: {kind: every, steps: 4, merge_at: end}, deadline_s: 60, "
            "evaluate: merged}",
        ),
        config="demo_gossip.yaml",
        period=4,
        varies=True,
        dense_steps=1,
    ),
    Contender("thinwire partition, fp32", (f"{PARTITION}}}",), config="demo_partition.yaml"),
    Contender(
        "thinwire partition, 4 bits",
        (
            f"{PARTITION}, gradients: {{world: {{kind: int4, rounding: stochastic}}}}, update: {{kind: difference, "
            "bits: 4}}",
        ),
        config="demo_partition.yaml",
    ),
)
PEERS = (
    Contender(DDP, peer="ddp-fp32"),
    Contender("torch DDP, bf16 hook", peer="ddp-bf16"),  # gloo has no bf16 reduction
    Contender("torch DDP, fp16 hook", peer="ddp-fp16"),
    Contender("torch DDP, PowerSGD hook 16", peer="powersgd", warm_up_steps=4, dense_steps=2),
    Contender(
        "torch post-local SGD, every 10", peer="post-local-sgd", warm_up_steps=EVERY, period=EVERY, dense_steps=EVERY
    ),
    Contender("plain DiLoCo, every 10", peer="diloco", period=EVERY),
    Contender("torch FSDP2", peer="fsdp2", trains_as=DDP),
    Contender("torch HSDP, pairs", peer="hsdp", trains_as=DDP),
    *(
        Contender(f"DeepSpeed ZeRO-{stage}", peer=f"zero-{stage}", environment="deepspeed", trains_as=DDP)
        for stage in range(4)
    ),
    Contender("torchft DDP", peer="torchft-ddp", environment="torchft", trains_as=DDP),
    Contender("torchft local SGD, every 10", peer="torchft-local-sgd", environment="torchft", period=EVERY),
    Contender("torchft DiLoCo, every 10", peer="torchft-diloco", environment="torchft", period=EVERY),
    Contender("hivemind Optimizer", peer="hivemind", environment="hivemind"),
)

LIMITS_S = {"hivemind": 1500.0}
"""Of a run, for peers whose steps take seconds on any link."""
