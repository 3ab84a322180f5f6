"""Thinwire's hierarchical, metered and compressed collectives in the place of DeepSpeed's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from thinwire.comm.channel import Channel
from thinwire.comm.partition.deepspeed_padding import reduce_scatter_coalesced
from thinwire.comm.partition.levels import Levels, MachineMesh, levels_of
from thinwire.comm.partition.placement import Placement
from thinwire.comm.partition.rank_order import RankOrder
from thinwire.comm.partition.wires.gradients import GradientWireSettings, PlainGradients, formats_of
from thinwire.comm.partition.wires.plain import PlainWire
from thinwire.comm.partition.wires.weights import GatherWireSettings, build_gather_wire
from thinwire.comm.partition.wires.wire import Wire
from thinwire.comm.queue import CommQueue, Pending, open_queue

OPERATION = "deepspeed"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXACT_BELOW = 1024  # elements: smaller tensors, such as norms, travel in their own dtype
_KEYS_PER_CALL = 64  # one for each level, and more than any machine has levels


class DeepSpeedComm:
    """The handle of deepspeed_comm(): a comm.method.Method, and DeepSpeed's backend object at once.

    What it does not know, broadcasts and barriers for example, it leaves to the backend that it stands before.
    """

    def __init__(
        self,
        backend: Any,
        levels: Levels,
        queue: CommQueue,
        gradients: Mapping[str, Wire],
        gather: Wire | None,
        *,
        exact_below: int,
        seed: int,
        leave: Callable[[], None],
    ) -> None:
        self._backend = backend
        self._levels = levels
        self._queue = queue
        self._gradients = dict(gradients)
        self._gather = gather
        self._exact_below = exact_below
        self._seed = seed
        self._leave = leave
        self._trees: dict[tuple[int, ...], RankOrder] = {}
        self._is_exact = False
        self._calls = 0
        self._passed_on: Counter[str] = Counter()
        self._sent: Counter[str] = Counter()
        self._sent_in_step: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_backend" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._backend, name)

    # What DeepSpeed calls, by DeepSpeed's names of the arguments.

    def reduce_scatter_tensor(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        op: Any = dist.ReduceOp.SUM,
        group: ProcessGroup | None = None,
        async_op: bool = False,
    ) -> _Wait | Any:
        """Overwrite the output by this rank's slice of the sum, or of the mean for AVG."""
        scale = self._scale(op, input_tensor, group)
        if scale is None:
            self._passed_on["reduce_scatter"] += 1
            return self._backend.reduce_scatter_tensor(output_tensor, input_tensor, op, group, async_op)
        tree, wires, key = self._tree(group), self._wires(input_tensor), self._next_key()
        self._sent.update(tree.reduce_scatter_bytes(input_tensor.numel(), wires))

        def exchange(channel: Channel) -> None:
            values = input_tensor.detach().reshape(-1).to(torch.float32)
            own = tree.reduce_scatter(channel, values, wires, key=key)
            output_tensor.detach().copy_(own.mul_(scale).view_as(output_tensor))

        return self._run("reduce_scatter", exchange, async_op)

    def all_reduce(
        self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: ProcessGroup | None = None, async_op: bool = False
    ) -> _Wait | Any:
        """Replace the tensor by the sum, or by the mean for AVG: the same bits on every rank."""
        scale = self._scale(op, tensor, group)
        if scale is None:
            self._passed_on["all_reduce"] += 1
            return self._backend.all_reduce(tensor, op, group, async_op)
        tree, wires, key = self._tree(group), self._wires(tensor), self._next_key()
        self._sent.update(tree.all_reduce_bytes(tensor.numel(), wires))

        def exchange(channel: Channel) -> None:
            total = tree.all_reduce(channel, tensor.detach().reshape(-1).to(torch.float32), wires, key=key)
            tensor.detach().copy_(total.mul_(scale).view_as(tensor))

        return self._run("all_reduce", exchange, async_op)

    def all_gather_into_tensor(
        self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup | None = None, async_op: bool = False
    ) -> _Wait | Any:
        """Overwrite the output by every rank's tensor; what was quantised is so for its own rank too."""
        if not self._is_ours(input_tensor, group):
            self._passed_on["all_gather"] += 1
            return self._backend.all_gather_into_tensor(output_tensor, input_tensor, group, async_op)
        tree, output = self._tree(group), output_tensor.detach()
        exact = self._is_exact or output.numel() < self._exact_below
        wire = None if exact else self._gather
        key = self._next_key()
        own_bytes = input_tensor.nbytes if wire is None else wire.payload_bytes(input_tensor.numel())
        self._sent.update(tree.all_gather_bytes(own_bytes))

        def exchange(channel: Channel) -> None:
            own = input_tensor.detach().reshape(-1)
            if wire is None:
                gathered = tree.all_gather(channel, own.view(torch.uint8))
                output.copy_(gathered.reshape(-1).view(own.dtype).view_as(output))
                return
            payloads = tree.all_gather(channel, wire.encode(own.to(torch.float32), [own.numel()], key=key))
            for payload, into in zip(payloads, output.view(tree.size, -1), strict=True):
                wire.decode(payload, into)

        return self._run("all_gather", exchange, async_op)

    def exact(self) -> Any:
        """A context in which everything travels as it is: to read or write whole weights and optimizer states."""
        return self._exactly()

    def end_step(self) -> None:
        """Say that an optimizer step has ended: predicted_bytes() speaks of the calls since the one before."""
        self._sent_in_step, self._sent = dict(self._sent), Counter()

    # What everybody else calls: comm.method.Method.

    def state_dict(self) -> dict[str, Any]:
        """How many collectives there have been: random numbers of stochastic rounding follow from it."""
        return {"calls": self._calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after as many collectives, after the most that a rank had where the number of ranks has changed.

        Raises:
            ValueError: the state is another method's.
        """
        states = state.get("all_ranks", [state])
        if any(set(one) != {"calls"} for one in states):
            held = sorted({key for one in states for key in one})
            raise ValueError(
                f"method: the checkpoint holds the state {held} of another method; DeepSpeed's collectives keep "
                "only `calls`; start without the checkpoint"
            )
        self._calls = max(int(one["calls"]) for one in states)

    def predicted_bytes(self) -> dict[str, int]:
        """Payload bytes, by level, that a step with the collectives of the last one sends from this rank.

        DeepSpeed chooses its collectives as it goes: nothing is known before the first end_step().
        """
        return {level: count for level, count in self._sent_in_step.items() if count}

    def metrics(self) -> dict[str, float]:
        """calls: collectives so far. passed_on: those left to torch: other dtypes, integers, maxima; not metered."""
        return {"calls": float(self._calls), "passed_on": float(self._passed_on.total())}

    def remove(self) -> None:
        """Give DeepSpeed its own backend back."""
        self._leave()

    def _run(self, kind: str, exchange: Callable[[Channel], None], async_op: bool) -> _Wait | None:
        pending = self._queue.submit(f"{OPERATION}/{kind}", exchange)
        if async_op:
            return _Wait(pending)
        pending.wait()
        return None

    def _scale(self, op: Any, tensor: Tensor, group: ProcessGroup | None) -> float | None:
        """What to multiply the sum by; None for what is not ours."""
        if not self._is_ours(tensor, group):
            return None
        op = self._backend._reduce_op(op)
        if op == dist.ReduceOp.SUM:
            return 1.0
        return 1.0 / dist.get_world_size(group) if op == dist.ReduceOp.AVG else None

    def _is_ours(self, tensor: Tensor, group: ProcessGroup | None) -> bool:
        return tensor.dtype in _DTYPES and dist.get_world_size(group) > 1

    def _wires(self, tensor: Tensor) -> dict[str, Wire]:
        """The format of each level: "same" is the tensor's own dtype, in which small tensors always travel."""
        same = PlainWire(tensor.dtype)
        if self._is_exact or tensor.numel() < self._exact_below:
            return dict.fromkeys(self._levels.names, same)
        return {name: self._gradients.get(name, same) for name in self._levels.names}

    def _tree(self, group: ProcessGroup | None) -> RankOrder:
        ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
        if ranks not in self._trees:
            self._trees[ranks] = RankOrder(self._levels, ranks)
        return self._trees[ranks]

    def _next_key(self) -> int:
        self._calls += 1
        number = (self._calls * self._levels.world_size + self._levels.rank) * _KEYS_PER_CALL
        return ((self._seed << 32) + number) % (1 << 63)

    @contextmanager
    def _exactly(self) -> Iterator[None]:
        before, self._is_exact = self._is_exact, True
        try:
            yield
        finally:
            self._is_exact = before


class _Wait:
    """What DeepSpeed waits for."""

    def __init__(self, pending: Pending[None]) -> None:
        self._pending = pending

    def wait(self) -> bool:
        self._pending.wait()
        return True

    def is_completed(self) -> bool:
        return self._pending.done()


def deepspeed_comm(
    mesh: MachineMesh | DeviceMesh,
    *,
    gradients: Mapping[str, Any] | None = None,
    default: Any = "same",
    gather: Any = "same",
    queue: CommQueue | None = None,
    exact_below: int = EXACT_BELOW,
    seed: int = 0,
    timeout_s: float = 60.0,
) -> DeepSpeedComm:
    """Let DeepSpeed's ZeRO send its gradients and weights by thinwire's hierarchical collectives.

    ZeRO++ (Wang et al. 2023, 2306.10209) quantises weights to int8 and gradients to int4 by a two-hop all-to-all. Here
    reduce-scatter goes from the fastest level to the slowest, all-gather back; each hop has a format of its own, is
    added in fp32 and metered. The sum is sum_r g_r: by the code of DeepSpeed 0.19, its qgZ leaves a matrix too large by
    the number of devices of a node, and reads bf16 as fp16. It works with gloo, where DeepSpeed's quantisation does
    not, for all stages (0 to 2 reduce by all_reduce), with hpZ, and in any program that calls deepspeed.initialize().

    Call it after deepspeed.init_distributed() and before deepspeed.initialize(). What is left to DeepSpeed's own
    backend: tensors that are not fp32, bf16 or fp16, operations other than SUM and AVG, broadcasts. `with
    handle.exact():` sends everything as it is; use it around safe_get_full_* and checkpoints, whose gathers cannot
    be told from those of weights. use_all_reduce_for_fetch_params makes gathers look like sums of gradients: leave it
    off.

    Args:
        mesh: world.mesh, or a DeviceMesh with named dimensions, slowest first, over all ranks.
        gradients: format by level, as method.gradients of partition: {"node": "bf16", "world": {"kind": "int4"}};
            error feedback is refused: DeepSpeed's collectives do not say whose gradient they carry.
        default: format of gradients on other levels: "same", the tensor's own dtype, or {"kind": "bf16"} and the like.
        gather: format of gathered weights: "same" or as method.gather of partition.
        queue: over all ranks; default: a new one.
        exact_below: tensors of fewer elements, norms for example, travel in their own dtype.
        seed: of stochastic rounding, below 2^31.
        timeout_s: deadline of one collective when no queue is given, in seconds.
    Raises:
        ValueError: DeepSpeed is missing or has not been initialised; an unknown level; a format that cannot be used.
            From a collective: it joins ranks that no level of the mesh joins.
        PeerLostError, PeerLateError, PeerFailedError: from a collective, when a rank is gone or overdue.

    Example:
        deepspeed.init_distributed("gloo")
        thinwire.deepspeed_comm(world.mesh, gradients={"world": "int4"}, gather="int8", queue=world.queue)
        engine, *_ = deepspeed.initialize(model=model, config=config)
    """
    module = _deepspeed_module()
    from deepspeed.runtime.zero import stage3

    levels = levels_of(mesh, rank=dist.get_rank(), world_size=dist.get_world_size())
    wires = gradient_wires(gradients or {}, default, levels)
    gather_wire = build_gather_wire(_checked("gather", GatherWireSettings, gather))
    if exact_below < 0 or not 0 <= seed < 1 << 31:
        raise ValueError(f"exact_below: {exact_below} and seed: {seed} must not be negative, and seed below 2^31")
    backend = module.cdb

    reducer = stage3.reduce_scatter_coalesced

    def leave() -> None:
        if module.cdb is comm:
            module.cdb = backend
            stage3.reduce_scatter_coalesced = reducer

    comm = DeepSpeedComm(
        backend,
        levels,
        queue or open_queue(timeout_s=timeout_s),
        wires,
        gather_wire,
        exact_below=exact_below,
        seed=seed,
        leave=leave,
    )
    module.cdb = comm
    stage3.reduce_scatter_coalesced = reduce_scatter_coalesced
    return comm


def _deepspeed_module() -> Any:
    try:
        import deepspeed.comm.comm as module
    except ImportError as error:
        raise ValueError(
            f"DeepSpeed is not installed ({error}); install thinwire[deepspeed], or use tw.partition"
        ) from None
    if module.cdb is None:
        raise ValueError("DeepSpeed has no backend yet: call deepspeed.init_distributed() before deepspeed_comm()")
    if isinstance(module.cdb, DeepSpeedComm):
        raise ValueError("DeepSpeed's collectives are thinwire's already: call remove() on the first handle")
    return module


def gradient_wires(given: Mapping[str, Any], default: Any, levels: Levels) -> dict[str, Wire]:
    """The wires of levels that have one of their own; the others use the tensor's dtype."""
    checked = {name: _checked(f"gradients.{name}", GradientWireSettings, settings) for name, settings in given.items()}
    for name, settings in checked.items():
        if settings.feedback:
            raise ValueError(
                f"gradients.{name}.feedback: true, but DeepSpeed's collectives do not say whose gradient they carry, "
                "so what a format leaves out cannot be kept; leave it out, or use method partition"
            )
    everywhere = Placement(levels.depth, levels.depth, levels.depth)
    named = {levels.names[levels.named[name] - 1] for name in checked if levels.named.get(name)}
    formats = formats_of(checked, levels, everywhere)
    wires = (
        {} if default == "same" else dict.fromkeys(levels.names, _checked("default", PlainGradients, default).build())
    )
    return wires | {level: formats[level].build() for level in named}


def _checked(path: str, kind: Any, given: Any) -> Any:
    """ValueErrors of pydantic begin with what they were about; this says where."""
    try:
        return TypeAdapter(kind).validate_python(given)
    except ValueError as error:
        raise ValueError(f"{path}: {given!r}: {error}") from None
