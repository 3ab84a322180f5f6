"""A run's cost on a cluster: its method's forecast on the cluster's levels, laid out as a timeline."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from thinwire.comm.forecast import Forecast
from thinwire.dist.models import build_model
from thinwire.dist.models.hf import HFSettings
from thinwire.dist.plan.cluster import Cluster, ComputeSpeed
from thinwire.dist.plan.forecasts import Subject, forecast_run
from thinwire.dist.plan.timeline import ComputeTime, StepTime, step_time
from thinwire.dist.plan.trace import trace_step
from thinwire.dist.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from thinwire.dist.config import RunConfig

_OPTIMIZER_FLOPS = 20  # AdamW's, for each element


@dataclass(frozen=True)
class Prediction:
    """What one rank does in one step of a run.

    compute_from: where the computing's seconds come from: measured by a probe, or counted operations at a rate.
    memory_bytes: by state, activations of a micro-batch among them.
    """

    config: RunConfig
    cluster: Cluster
    forecast: Forecast
    time: StepTime
    micro_batches: int
    compute_from: str
    memory_bytes: Mapping[str, int]

    @property
    def sent_bytes(self) -> dict[str, float]:
        """Payload per step, by level, in the mean."""
        return self.forecast.bytes_per_step()

    def cost(self, steps: int) -> float:
        """Of so many steps on all devices, in the cluster's currency."""
        return steps * self.time.step_s / 3600 * self.cluster.size * self.cluster.price_per_device_hour


def subject_of(config: RunConfig, ranks: int) -> Subject:
    """The run's model on the meta device, and the trace of a micro-batch on one of so many ranks."""
    if isinstance(config.model, HFSettings):
        raise ValueError(f"model.kind: {config.model.kind} cannot be planned: its shape is in its folder")
    micro_batch, _ = config.train.share(ranks)
    vocab = load_tokenizer(config.data.tokenizer).vocab
    model = build_model(config.model, tokenizer_vocab=vocab, seed=config.seed, device=torch.device("meta"))
    tokens = torch.zeros(micro_batch, config.model.context, dtype=torch.long, device="meta")
    return Subject(config, model, trace_step(model, tokens, tokens))


def predict(config: RunConfig, cluster: Cluster, subject: Subject | None = None) -> Prediction:
    """What a step of this run will cost on this cluster.

    Args:
        subject: of the same model and micro-batch, to save the trace.
    Raises:
        ValueError: the run does not fit the cluster.
    """
    subject = subject or subject_of(config, cluster.size)
    micro_batch, micro_batches = config.train.share(cluster.size)
    forecast = forecast_run(subject, cluster.seat(0))
    compute, source = _compute(subject, cluster, micro_batch)
    memory = Counter(forecast.memory_bytes) + Counter({"activations": subject.trace.activation_bytes})
    time = step_time(forecast, subject.trace, compute, cluster, micro_batches=micro_batches)
    return Prediction(config, cluster, forecast, time, micro_batches, source, dict(memory))


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


def _compute(subject: Subject, cluster: Cluster, micro_batch: int) -> tuple[ComputeTime, str]:
    wanted = compute_digest(subject.config, micro_batch)
    found: ComputeSpeed | None = next(
        (one for one in (cluster.measured.computes if cluster.measured else ()) if one.config == wanted), None
    )
    if found is not None:
        return ComputeTime(found.forward_s, found.backward_s, found.optimizer_s), "measured by the probe"
    rate = cluster.device.flops_per_s
    trace = subject.trace
    elements = sum(parameter.numel for parameter in subject.parameters if parameter.trained)
    seconds = (flops / rate for flops in (trace.forward_flops, trace.backward_flops, _OPTIMIZER_FLOPS * elements))
    return ComputeTime(*seconds), f"counted operations at {rate / 1e12:.3g} TFLOP/s"
