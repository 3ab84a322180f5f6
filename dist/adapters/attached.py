"""A method inside somebody else's training loop: how it is named, how it enters, and what a checkpoint keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Annotated, Any, TypeAlias

import torch
from pydantic import Field, ValidationError
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from thinwire.comm.allreduce import AllReduceSettings, allreduce
from thinwire.comm.compress.door import enter as enter_compress
from thinwire.comm.compress.handle import LossScale
from thinwire.comm.compress.settings import CompressSettings
from thinwire.comm.local_sgd.door import LocalSGDSettings
from thinwire.comm.local_sgd.door import enter as enter_local_sgd
from thinwire.comm.local_sgd.handle import LocalSGD
from thinwire.comm.method import DescribedMethod, Method, agreed_weights
from thinwire.comm.queue import CommQueue, open_queue
from thinwire.comm.settings import Settings
from thinwire.dist.adapters.rank_states import gather_at_first
from thinwire.dist.config_errors import ConfigError, explain
from thinwire.dist.methods import exact_groups
from thinwire.dist.world import World

AttachableSettings: TypeAlias = AllReduceSettings | CompressSettings | LocalSGDSettings
MethodChoice: TypeAlias = AttachableSettings | Mapping[str, Any] | str

# Methods that need no adapter, or that no such loop can run, and what to do instead.
_ELSEWHERE = {
    "gossip": "call tw.gossip(optimizer, model=...) in a loop of your own, on a model without DistributedDataParallel",
    "onebyte": "it needs no backward pass: give the loop tw.OneByteSPSA as its optimizer",
    "partition": "it shards the model itself: call optimizer = tw.partition(model, world.mesh, ...) before the loop",
}


class _Named(Settings):
    method: Annotated[AttachableSettings, Field(discriminator="kind")]


def settings_of(method: MethodChoice, where: str) -> AttachableSettings:
    """The settings that a caller has given as settings, as a mapping with `kind`, or as the name of a kind.

    Args:
        where: the call, for the message.
    Raises:
        ConfigError: a key, a value or a method that cannot be used.
    """
    kind = method if isinstance(method, str) else method.get("kind") if isinstance(method, Mapping) else None
    if kind in _ELSEWHERE:
        raise ConfigError(f"{where}: method: {kind} does not enter by DistributedDataParallel; {_ELSEWHERE[str(kind)]}")
    given = {"kind": method} if isinstance(method, str) else method
    try:
        return _Named.model_validate({"method": dict(given) if isinstance(given, Mapping) else given}).method
    except ValidationError as error:
        raise ConfigError(explain(error, _Named, where)) from None


class Attached:
    """A method that has entered a loop of others. Members of comm.method.Method, but with states of all ranks together.

    Args:
        method: its handle.
        queue: what it exchanges through.
        optimizer: of the loop, without wrappers, where the method is one under which each rank's is its own.
        device: of the model.
        owns_queue: whether the queue ends with remove().
    Attributes: method, queue.
    """

    def __init__(
        self, method: Method, queue: CommQueue, optimizer: Optimizer | None, device: torch.device, *, owns_queue: bool
    ) -> None:
        self.method = method
        self.queue = queue
        self._device = device
        self._owns_queue = owns_queue
        self._optimizer = optimizer if isinstance(method, LocalSGD) else None
        self._loaded: Mapping[Any, Any] | None = None  # this rank's optimizer state, until the first step
        if self._optimizer is not None:
            self._hook = self._optimizer.register_step_pre_hook(lambda *_: self._bring_back())

    def state_dict(self) -> dict[str, Any]:
        """{"all_ranks": [state of each rank]} on rank 0, which writes it, and {} on the others. Collective.

        Raises:
            ValueError: in the middle of a round of local_sgd, where the ranks' weights differ.
        """
        states = gather_at_first(self.own_state(), self.queue, self._device)
        return {"all_ranks": states} if states else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what state_dict() gave on rank 0, among as many ranks or others.

        Raises:
            ValueError: it is no such state, or another method's.
        """
        states = state.get("all_ranks") if isinstance(state, Mapping) else None
        if not states or any("method" not in one for one in states):
            raise ValueError(
                "thinwire: what the checkpoint holds for it is no state of all ranks; give what state_dict() returned "
                "on rank 0, or start without the checkpoint"
            )
        self.take_over(states)

    def own_state(self) -> dict[str, Any]:
        """This rank's: that of the method, and of the optimizer where each rank has its own."""
        self.check_agreed("a checkpoint")
        state: dict[str, Any] = {"method": self.method.state_dict()}
        if self._optimizer is not None:
            self._bring_back()
            state["optimizer"] = self._optimizer.state_dict()["state"]
        return state

    def take_over(self, states: list[dict[str, Any]]) -> None:
        """What own_state() gave on each of the old ranks, in rank order."""
        same = len(states) == self.queue.size
        methods = [one["method"] for one in states]
        self.method.load_state_dict(methods[self.queue.rank] if same else {"all_ranks": methods})
        if self._optimizer is not None:
            # The loop may put rank 0's state into the optimizer before or after this. At the first step it has.
            self._loaded = states[self.queue.rank % len(states)]["optimizer"]

    def check_agreed(self, what: str) -> None:
        """Refuse `what` where the ranks' weights differ: these libraries keep and evaluate as if they were equal.

        Raises:
            ValueError: local_sgd is in the middle of a round.
        """
        if isinstance(self.method, LocalSGD) and not self.method.is_between_rounds:
            raise ValueError(
                f"method: local_sgd is in the middle of a round of {self.method.every} steps, where each rank has "
                f"weights of its own; {what} belongs after a multiple of {self.method.every} steps"
            )

    def agreed(self) -> AbstractContextManager[None]:
        """Within this context the model holds weights that are the same on every rank."""
        return agreed_weights(self.method)

    def predicted_bytes(self) -> dict[str, int]:
        """Payload bytes that this rank sends in one step, by level."""
        return self.method.predicted_bytes()

    def metrics(self) -> dict[str, float]:
        """Numbers worth logging, by name."""
        return self.method.metrics()

    def describe(self) -> str:
        """Lines for the start of a run."""
        return self.method.describe() if isinstance(self.method, DescribedMethod) else ""

    def remove(self) -> None:
        """Leave the loop as it was before."""
        if self._optimizer is not None:
            self._hook.remove()
        self.method.remove()
        if self._owns_queue:
            self.queue.close()
            self.queue.monitor.close()

    def _bring_back(self) -> None:
        if self._loaded is None or self._optimizer is None:
            return
        loaded, self._loaded = self._loaded, None
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": dict(loaded), "param_groups": groups})


def attach(
    settings: AttachableSettings,
    model: DistributedDataParallel,
    optimizer: Any,
    *,
    scaler: LossScale | None = None,
    clip_norm: float = 0.0,
    world: World | None = None,
    timeout_s: float = 60.0,
) -> Attached:
    """Let a method into a DDP model that another library has wrapped. Collective.

    Args:
        optimizer: the loop's, in the library's own wrapper or not; None where there are several.
        scaler: the GradScaler of the loop.
        clip_norm: of the true gradient, before it is compressed; 0 = no limit.
        world: of thinwire.init(), for its queue and its levels; default: a queue of its own over the model's ranks.
        timeout_s: deadline of one operation without a world, in seconds.
    Raises:
        ValueError: a combination that cannot work; nothing has been changed.
    """
    if clip_norm and not isinstance(settings, CompressSettings):
        raise ValueError(
            f"clip_norm: {clip_norm} is for method compress, which clips before it compresses; under method "
            f"{settings.kind} let the loop clip"
        )
    inner = getattr(settings, "exact_within", None)
    if inner is not None and world is None:
        raise ValueError(f"method.exact_within: {inner} is a level of thinwire's mesh: give world=thinwire.init()")
    plain = unwrapped_optimizer(optimizer)
    if isinstance(settings, LocalSGDSettings):
        if plain is None:
            raise ValueError(
                "optimizer: method local_sgd counts the steps of the one optimizer of all parameters; give it, and "
                "train with a single one"
            )
        if scaler is not None:
            raise ValueError(
                "method: local_sgd needs equally many steps on all ranks, and a GradScaler skips one on the rank alone "
                "that overflows; train in bf16 or fp32"
            )
    queue = world.queue if world is not None else open_queue(model.process_group, timeout_s=timeout_s)
    groups = exact_groups(inner, world.mesh) if world is not None else None
    device = next(model.parameters()).device
    match settings:
        case AllReduceSettings():
            method: Method = allreduce(model, dtype=settings.dtype, exact_within=groups, queue=queue)
        case CompressSettings():
            method = enter_compress(
                model,
                settings,
                inner=groups,
                clip_norm=clip_norm,
                scaler=scaler,
                optimizer=plain,
                queue=queue,
            )
        case LocalSGDSettings():
            assert plain is not None, "refused above"
            method = enter_local_sgd(model, plain, settings, queue=queue)
    return Attached(method, queue, plain, device, owns_queue=world is None)


def check_clipping(settings: AttachableSettings, limit: float | None, name: str, call: str) -> None:
    """Refuse that a loop clips what has been decoded where the true gradient was meant.

    Args:
        limit: the loop's own setting; None or 0 = it does not clip.
        name: of that setting.
        call: of the adapter.
    Raises:
        ValueError: says how to clip before compression, and how after it.
    """
    if limit and isinstance(settings, CompressSettings) and settings.clip == "before":
        raise ValueError(
            f"{name}: {limit} would clip the decoded mean, of which the error memory then knows nothing; set it to 0 "
            f"and give {call}(..., clip_norm={limit}), which clips the true gradient before it is compressed, or give "
            "the method `clip: after`"
        )


def ddp_module(model: nn.Module, what: str) -> DistributedDataParallel:
    """The DistributedDataParallel module that a library has made, out of torch.compile's wrapper.

    Raises:
        ValueError: it is none.
    """
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, DistributedDataParallel):
        raise ValueError(
            f"{what}: expected a model in DistributedDataParallel, found {type(inner).__name__}; start two processes "
            "or more (torchrun --nproc-per-node 2), train data parallel, and call this once the library has wrapped it"
        )
    return inner


def unwrapped_optimizer(optimizer: Any) -> Optimizer | None:
    """torch's own optimizer behind the wrappers of Accelerate, Lightning and Fabric, whose hooks nobody calls."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer if isinstance(optimizer, Optimizer) else None
