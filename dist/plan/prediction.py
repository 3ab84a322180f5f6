"""A run's cost on a cluster: its method's forecast on the cluster's levels, laid out as a timeline."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from thinwire.comm.forecast import Forecast
from thinwire.comm.partition.levels import WHOLE
from thinwire.comm.partition.settings import PartitionSettings
from thinwire.dist.engine import FSDP2Settings
from thinwire.dist.gossip_run import GossipRunSettings
from thinwire.dist.models import build_model
from thinwire.dist.models.hf import HFSettings, load_pretrained
from thinwire.dist.onebyte_run import OneByteRunSettings
from thinwire.dist.plan.cluster import Cluster, ComputeSpeed, SweepSpeed
from thinwire.dist.plan.forecasts import Subject, forecast_run
from thinwire.dist.plan.timeline import ComputeTime, StepTime, step_time
from thinwire.dist.plan.trace import StepTrace, trace_step
from thinwire.dist.prompts import Prompts
from thinwire.dist.task import choose_parameters, computing
from thinwire.dist.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from thinwire.dist.config import RunConfig

_OPTIMIZER_FLOPS = 20  # AdamW's, for each element
_DIRECTION_FLOPS = 10  # for each element, to draw a random sign and add it on the lattice
_META = torch.device("meta")
_MEASURED = "measured by the probe"
_NOT_TIMED = "encoding and decoding count as nothing until `thinwire probe` has timed them"
_NOT_TIMED_HERE = (
    "encoding by {} counts as nothing: this probe has not timed it; a probe of this run's configuration does"
)
_OTHER_COMPUTING = (
    "the probe has not timed the computing of this model and micro-batch, so operations are counted instead; "
    "`thinwire probe CONFIG` times it"
)


@dataclass(frozen=True)
class Prediction:
    """What one rank does in one step of a run.

    compute_from: where the computing's seconds come from: measured by a probe, or counted operations at a rate.
    memory_bytes: by state, activations of a micro-batch among them.
    trace: of a micro-batch, as the engine runs it.
    rank: whose figures these are.
    """

    config: RunConfig
    cluster: Cluster
    forecast: Forecast
    time: StepTime
    micro_batches: int
    compute_from: str
    memory_bytes: Mapping[str, int]
    trace: StepTrace
    compute: ComputeTime
    rank: int = 0

    @property
    def sent_bytes(self) -> dict[str, float]:
        """Payload per step, by level, in the mean."""
        return self.forecast.bytes_per_step()

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return sum(self.memory_bytes.values()) <= self.cluster.device.memory_bytes

    @property
    def remarks(self) -> list[str]:
        """What is not foretold, or only roughly."""
        measured = self.cluster.measured
        codecs = dict.fromkeys(coding.codec for exchange in self.forecast.exchanges for coding in exchange.coding)
        timed = measured.codecs if measured else {}
        unknown = [codec for codec in codecs if codec not in timed]
        return [
            *self.forecast.remarks,
            *(measured.remarks if measured else []),
            *([_NOT_TIMED_HERE.format(", ".join(unknown))] if unknown and timed else []),
            *([_NOT_TIMED] if unknown and not timed else []),
            *([_OTHER_COMPUTING] if measured and self.compute_from != _MEASURED else []),
        ]

    def on(self, cluster: Cluster) -> Prediction:
        """The same on links of other rates between the same levels."""
        time = _timeline(self.config, self.forecast, self.trace, self.compute, cluster)
        return replace(self, cluster=cluster, time=time)

    def cost(self, steps: float) -> float:
        """Of so many steps on all devices, in the cluster's currency."""
        return steps * self.time.step_s / 3600 * self.cluster.size * self.cluster.price_per_device_hour


def subject_of(config: RunConfig, ranks: int) -> Subject:
    """The run's model on the meta device, and the trace of a micro-batch on one of so many ranks.

    Raises:
        ValueError: the global batch cannot be shared so, or the folder of a pretrained model does not hold one.
    """
    micro_batch, _ = config.train.share(ranks)

    def context() -> AbstractContextManager[Any]:
        return computing(config.train.precision, torch.device("cpu"))

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.long, device=_META)

    if isinstance(config.model, HFSettings):
        pretrained = load_pretrained(config.model, _META)
        prompts = Prompts(pretrained, config.data.template, config.data.labels)
        scoring = prompts.scoring(config.model.temperature).to(_META).eval()
        network = pretrained.network
        choose_parameters(network, config.train.parameters)
        inputs = {name: zeros(micro_batch, pretrained.context) for name in ("ids", "mask")}
        inputs["position"] = zeros(micro_batch)
        trace = trace_step(scoring, inputs, zeros(micro_batch), context=context, network=network)
        return Subject(config, network, trace)
    vocab = load_tokenizer(config.data.tokenizer).vocab
    model = build_model(config.model, tokenizer_vocab=vocab, seed=config.seed, device=_META)
    choose_parameters(model, config.train.parameters)
    tokens = zeros(micro_batch, config.model.context)
    return Subject(config, model, trace_step(model, tokens, tokens, context=context))


def predict(
    config: RunConfig, cluster: Cluster, subject: Subject | None = None, *, rank: int | None = None
) -> Prediction:
    """What a step of this run will cost on this cluster.

    Args:
        subject: of the same model and micro-batch, to save the trace.
        rank: whose bytes and seconds; None: rank 0's, and of machines that do not all send alike, the one's that waits
            longest, among those at the ends of their groups.
    Raises:
        ValueError: the run does not fit the cluster, or its method has no forecast.
    """
    check_levels(config, cluster)
    subject = subject or subject_of(config, cluster.size)
    micro_batch, micro_batches = config.train.share(cluster.size)
    is_checkpointed = isinstance(config.engine, FSDP2Settings) and config.engine.activation_checkpointing
    trace = subject.trace.checkpointed() if is_checkpointed else subject.trace
    compute, source = _compute(subject, trace, cluster, micro_batch)
    found = []
    for one in _looked_at(config, cluster) if rank is None else (rank,):
        forecast = forecast_run(subject, cluster.seat(one), cluster)
        time = _timeline(config, forecast, trace, compute, cluster)
        memory = Counter(forecast.memory_bytes) + Counter(_passing_bytes(config, trace))
        found.append(
            Prediction(config, cluster, forecast, time, micro_batches, source, dict(memory), trace, compute, one)
        )
    return max(found, key=lambda prediction: prediction.time.step_s)


def _looked_at(config: RunConfig, cluster: Cluster) -> list[int]:
    """Ranks that may send more than others: under gossip those at both ends of the first group of each level."""
    if not isinstance(config.method, GossipRunSettings):
        return [0]
    ends = {end for level in cluster.levels for end in (level.size - 1, level.size)}
    return [0, *sorted(end for end in ends if 0 < end < cluster.size)]


def _timeline(
    config: RunConfig, forecast: Forecast, trace: StepTrace, compute: ComputeTime, cluster: Cluster
) -> StepTime:
    _, micro_batches = config.train.share(cluster.size)
    prefetch = config.engine.prefetch if isinstance(config.engine, FSDP2Settings) else 0
    return step_time(forecast, trace, compute, cluster, micro_batches=micro_batches, prefetch=prefetch)


def check_levels(config: RunConfig, cluster: Cluster) -> None:
    """Raises ValueError where the run gives levels that the cluster's description has not."""
    if config.mesh.levels == "auto":
        return
    known = {level.name: level.size for level in cluster.levels} | {"world": cluster.size}
    for index, level in enumerate(config.mesh.levels):
        if known.get(level.name, level.size if level.size == 1 else None) != level.size:
            described = ", ".join(f"{name} of {size}" for name, size in known.items())
            raise ValueError(
                f"mesh.levels[{index}]: the run gives {level.name} of {level.size} ranks, but cluster {cluster.name} "
                f"has {described}; describe that level there, or give mesh.levels=auto"
            )


def compute_digest(config: RunConfig, micro_batch: int) -> str:
    """What the seconds of a micro-batch depend on, beside the machine: model, precision, optimizer, its size."""
    told = {
        "model": config.model.model_dump(mode="json", exclude={"weights"}),
        "tokenizer": config.data.tokenizer,
        "precision": config.train.precision,
        "optimizer": config.optimizer.kind,
        "threads": config.world.threads,
        "micro_batch": micro_batch,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _compute(subject: Subject, trace: StepTrace, cluster: Cluster, micro_batch: int) -> tuple[ComputeTime, str]:
    wanted = compute_digest(subject.config, micro_batch)
    method = subject.config.method
    computes = cluster.measured.computes if cluster.measured else ()
    # The probe of a one-byte run times forward passes alone: of use to no other method.
    usable = [one for one in computes if one.backward_s or isinstance(method, OneByteRunSettings)]
    found: ComputeSpeed | None = next((one for one in usable if one.config == wanted), None)
    rate = cluster.device.flops_per_s
    elements = sum(parameter.numel for parameter in subject.parameters if parameter.trained)
    if found is not None:
        again = (trace.backward_flops - subject.trace.backward_flops) / max(1, trace.forward_flops)
        backward_s = found.backward_s + again * found.forward_s
        time = ComputeTime(found.forward_s, backward_s, found.optimizer_s, found.coupled_s)
        source = _MEASURED
    else:
        flops = (trace.forward_flops, trace.backward_flops, _OPTIMIZER_FLOPS * elements)
        time = ComputeTime(*(count / rate for count in flops))
        source = f"counted operations at {rate / 1e12:.3g} TFLOP/s"
    if isinstance(method, OneByteRunSettings):  # no backward pass; several forward passes, and sweeps over the weights
        passes = 2 * method.samples if method.estimate == "two_sided" else method.samples + 1
        applied = method.samples * (cluster.size if method.directions == "distinct" else 1)
        sweep = cluster.measured.sweep if cluster.measured else None
        sweep = sweep or SweepSpeed(pass_s=0.0, direction_s=_DIRECTION_FLOPS / rate)
        # To the weights of each loss, back to those of the round, and on to the next ones.
        sweeps = ((passes + 2) * sweep.pass_s + (2 * passes + applied) * sweep.direction_s) * elements
        forward_s = found.forward_alone_s if found and found.forward_alone_s else time.forward_s
        time = ComputeTime(passes * forward_s, 0.0, sweeps)
    if isinstance(method, PartitionSettings) and method.optim != WHOLE:  # each rank updates what it owns
        time = replace(time, optimizer_s=time.optimizer_s / cluster.seat().size_of(method.optim))
    return time, source


def _passing_bytes(config: RunConfig, trace: StepTrace) -> dict[str, int]:
    """What a micro-batch keeps from forward to backward; where there is no backward pass, of one block at a time."""
    if isinstance(config.method, OneByteRunSettings):
        return {"activations": max((block.activation_bytes for block in trace.blocks), default=trace.activation_bytes)}
    is_cast = not isinstance(config.engine, FSDP2Settings)  # which gathers weights in the precision of the computing
    return {"activations": trace.activation_bytes, "casts": trace.cast_bytes if is_cast else 0}
