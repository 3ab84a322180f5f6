"""What the trainer really does to an injected gradient, measured with one of a known size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.comm.balance.bus import channel_needs_gpu
from thinwire.comm.balance.convention import Convention
from thinwire.comm.queue import CommQueue
from thinwire.comm.rank_names import name_ranks

ReadGradient = Callable[[nn.Parameter], Tensor | None]

TOLERANCE = 0.02  # gradients in bf16 are rounded by 2^-9 each time that they are added
_LOUDNESS = 256.0  # the probe, in multiples of the largest gradient that is already there


@dataclass(frozen=True)
class Reading:
    """What one rank saw. factor: what became of a gradient of 1; nan where the rank has no part of the parameter.

    spread: the largest difference of an entry's factor from their mean. passes: backward passes through the router.
    """

    factor: float
    spread: float
    passes: int


class Probe:
    """Adds a constant to the gradient of a router's parameter in every backward pass, as balancing adds its pull.

    It enters at the router's input, in a node beside the router's own: what is done to the parameter's gradient from
    there on, by autograd, DDP, FSDP2 or the trainer, is done to the probe too.

    Args:
        name: of the router's parameter.
        value: gives the constant, in the backward pass.
    """

    def __init__(self, router: nn.Module, name: str, value: Callable[[], float]) -> None:
        self.passes = 0
        self._router = router
        self._name = name
        self._value = value

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While it is; FSDP2's own hook comes before, so that the parameter is whole when ours sees it."""
        handle = self._router.register_forward_pre_hook(self._enter, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def sound(self) -> float:
        """The constant, once per backward pass."""
        self.passes += 1
        return self._value()

    def _enter(self, router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        parameter = router.get_parameter(self._name)
        for place, x in enumerate(args):
            if isinstance(x, Tensor) and x.is_floating_point():
                return (*args[:place], self._beside(x, parameter), *args[place + 1 :]), kwargs
        for name, x in kwargs.items():
            if isinstance(x, Tensor) and x.is_floating_point():
                return args, kwargs | {name: self._beside(x, parameter)}
        raise ValueError("router: its forward() takes no floating tensor; give the module that makes the logits")

    def _beside(self, x: Tensor, parameter: Tensor) -> Tensor:
        out: Tensor = _Node.apply(x, parameter, self)  # type: ignore[no-untyped-call]
        return out


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor, probe: Probe) -> Tensor:
        ctx.ones, ctx.probe = torch.ones_like(parameter), probe
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None]:
        return gradients[0], ctx.ones * ctx.probe.sound(), None


def check_factor(
    router: nn.Module,
    forward_backward: Callable[[], object],
    convention: Convention,
    queue: CommQueue,
    micro_batches: Callable[[], int],
    read: ReadGradient | None,
) -> None:
    """See LoadBalance.check_factor().

    Every rank's probe has another weight, and these sum to 1: a gradient that stays on its rank is told from a mean.
    """
    name = next((n for n, p in router.named_parameters() if p.requires_grad), None)
    if name is None:
        raise ValueError("router: has no parameter that is trained; give the module whose output are the logits")
    weight = 2 * (queue.rank + 1) / (queue.size * (queue.size + 1))
    random = _random_state(router.get_parameter(name).device)
    forward_backward()
    before = _read(router, name, read)
    loudest = max(told for (told,) in _tell(queue, [_largest(before)]))
    if math.isinf(loudest):
        raise ValueError("forward_backward: left NaN or infinite gradients; check the factor where they are finite")
    size = 2.0 ** math.ceil(math.log2(_LOUDNESS * loudest)) if loudest else 1.0

    def value() -> float:
        return float(convention.factor(queue.size, micro_batches())) * size * weight / micro_batches()

    probe = Probe(router, name, value)
    _set_random_state(router.get_parameter(name).device, random)
    with probe.attached():
        forward_backward()
    each = (_read(router, name, read) - before) / size
    mean = float(each.mean()) if each.numel() else math.nan
    told = _tell(queue, [mean, _largest(each - mean), float(probe.passes)])
    diagnose([Reading(m, s, int(n)) for m, s, n in told], convention, micro_batches())


def diagnose(readings: list[Reading], convention: Convention, micro_batches: int) -> None:
    """Compare what the ranks saw with what the settings say.

    Raises:
        ValueError: they differ; what to change.
    """
    for passes in {reading.passes for reading in readings} - {micro_batches}:
        who = [rank for rank, reading in enumerate(readings) if reading.passes == passes]
        told = "" if passes else "; give the router that is trained, and check before torch.compile()"
        raise ValueError(
            f"micro_batches: {micro_batches}, but forward_backward ran {passes} backward passes through the router on "
            f"{name_ranks(who)}; set micro_batches to the passes of one step{told}"
        )
    if any(math.isinf(reading.spread) for reading in readings):
        raise ValueError("forward_backward: a gradient of the router overflows its dtype; keep the router in fp32")
    factors = [reading.factor for reading in readings if not math.isnan(reading.factor)]
    factor = sum(factors) / len(factors)
    allowed = TOLERANCE * max(abs(factor), 1e-30)
    if any(abs(f - factor) > allowed for f in factors):
        raise ValueError(
            f"ranks: {convention.ranks!r}, but gradients differ among the ranks: of a sum of 1 they see "
            f"{', '.join(f'{f:.4g}' for f in factors)}; let forward_backward end when gradients have been reduced over "
            "all ranks of the balance's group (no no_sync() in its last pass). Where each rank steps by its own "
            "gradient, as in local SGD, 'mean' is right and there is nothing to check"
        )
    if max(reading.spread for reading in readings) > allowed:
        raise ValueError(
            "forward_backward: does not do the same to all entries of a gradient; leave out lossy compression and "
            "clipping by value while the factor is checked, and dropout that no seed repeats"
        )
    if abs(factor - 1) > TOLERANCE:
        raise ValueError(_advice(factor, convention, len(readings), micro_batches))


def _advice(factor: float, convention: Convention, size: int, micro_batches: int) -> str:
    """What setting would make the factor 1, if one would."""
    told = f"balance: the trainer makes {factor:.6g} of a balancing gradient that should be 1; "
    if factor == 0:
        return told + "let it reach the parameter: forward_backward must end with its gradient, and not clear it"
    scale = float(convention.loss_scale()) if convention.loss_scale else 1.0
    wanted = float(convention.factor(size, micro_batches)) / factor
    fits: list[tuple[int, str]] = []
    for ranks, by_ranks in (("mean", size), ("sum", 1)):
        for accumulation, by_units in (("sum", 1), ("mean", micro_batches)):
            changes = [f"ranks={ranks!r}"] * (ranks != convention.ranks)
            changes += [f"accumulation={accumulation!r}"] * (accumulation != convention.accumulation)
            if abs(scale * by_ranks * by_units / wanted - 1) <= TOLERANCE:
                fits.append((len(changes), ", ".join(changes)))
    fewest = min((count for count, _ in fits), default=0)
    if fits:
        return told + f"set {' or '.join(text for count, text in fits if count == fewest)}"
    if convention.loss_scale and abs(factor / scale - 1) <= TOLERANCE:
        return told + "unscale gradients at the end of forward_backward (GradScaler.unscale_), as before a step"
    return told + (
        f"if gradients are divided by {scale / factor:.6g} after the backward pass, set loss_scale=lambda: "
        f"{scale / factor:.6g}, under AMP loss_scale=scaler.get_scale; and clip no gradients in forward_backward"
    )


def _read(router: nn.Module, name: str, read: ReadGradient | None) -> Tensor:
    """This rank's part of the gradient, in fp64."""
    parameter = router.get_parameter(name)
    gradient = parameter.grad if read is None else read(parameter)
    if gradient is None:
        raise ValueError(
            f"forward_backward: left no gradient in the router's {name}; do not clear gradients at its end, and where "
            "an engine keeps them elsewhere give gradient=, such as deepspeed.utils.safe_get_full_grad"
        )
    local: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return local.detach().double().clone()


def _largest(x: Tensor) -> float:
    """Of the absolute values; inf where one is no finite number, 0 where there are none."""
    largest = float(x.abs().max()) if x.numel() else 0.0
    return largest if math.isfinite(largest) else math.inf


def _tell(queue: CommQueue, numbers: list[float]) -> list[list[float]]:
    """Of all ranks."""
    mine = torch.tensor(numbers, dtype=torch.float64, device="cuda" if channel_needs_gpu(queue) else "cpu")
    told: list[list[float]] = queue.submit("control/balance_factor", lambda c: c.all_gather_same(mine)).wait().tolist()
    return told


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
