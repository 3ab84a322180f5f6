"""Rounds of local steps, and the exchange at the end of each."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from thinwire.comm.errors import NonFiniteWeightsError
from thinwire.comm.finite import are_finite
from thinwire.comm.local_sgd.exchange import RoundExchange
from thinwire.comm.local_sgd.outer import Outer
from thinwire.comm.local_sgd.statistics import Statistics
from thinwire.comm.queue import CommQueue


class LocalSGD:
    """The handle of local_sgd(): a comm.method.LocalMethod.

    A round is `every` optimizer steps and the exchange after them. theta, the weights that all ranks had after the last
    exchange, is kept in fp32 beside the model.

    Args:
        model: what is trained, without a wrapper.
        exchange: takes the mean over the ranks, and remembers what the compressor left out.
        outer: makes the next theta from the mean of theta - theta_r; None: the mean of theta_r itself is the next one.
        every: optimizer steps of a round.
        silenced: the DDP module that shall leave gradients local, if any.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        exchange: RoundExchange,
        outer: Outer | None,
        *,
        every: int,
        queue: CommQueue,
        silenced: DistributedDataParallel | None,
    ) -> None:
        self._exchange = exchange
        self._outer = outer
        self._every = every
        self._queue = queue
        self._silenced = silenced
        self._average_gradients(False)
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._statistics = Statistics(model)
        self._theta = {name: _copy(p) for name, p in self._parameters.items()}
        self._step_of_round = 0
        self._rounds = 0
        self._predicted: dict[str, int] = {}
        self._pseudo_gradient_norm = 0.0
        self._memory_norms: dict[str, float] | None = {}
        self._hook = optimizer.register_step_post_hook(lambda *_: self._after_step())

    @property
    def every(self) -> int:
        """Optimizer steps of a round."""
        return self._every

    @property
    def is_between_rounds(self) -> bool:
        """Whether all ranks hold theta: no step has been taken since the last exchange."""
        return self._step_of_round == 0

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """Within this context the model holds theta, which is the same on every rank; afterwards its own weights."""
        live = {**self._parameters, **self._statistics.live}
        own = {name: tensor.data for name, tensor in live.items()}
        for name, value in {**self._theta, **self._statistics.agreed}.items():
            live[name].data = value.to(live[name].dtype)
        try:
            yield
        finally:
            for name, tensor in live.items():
                tensor.data = own[name]

    def state_dict(self) -> dict[str, Any]:
        """theta, the outer momentum, the memories of the feedback and the collective, and the place in the round.

        The states of the model and of its optimizer are each rank's own, and belong into a checkpoint rank by rank.
        """
        return {
            "size": self._queue.size,
            "rounds": self._rounds,
            "step_of_round": self._step_of_round,
            "theta": {name: value.clone() for name, value in self._theta.items()},
            "statistics": {name: value.clone() for name, value in self._statistics.agreed.items()},
            "outer": {} if self._outer is None else self._outer.state_dict(),
            "exchange": self._exchange.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what state_dict() gave on this rank; the model and the optimizer take back their own.

        After another number of ranks, {"all_ranks": [state of old rank 0, ...]}: the model is then put at theta, and
        what the old ranks have learnt in a round that was under way is lost. The errors are averaged, and their mean
        kept. The ranks' optimizers are the caller's business.

        Raises:
            ValueError: the state is another method's, another model's, or that of another number of ranks.
        """
        states = state.get("all_ranks", [state])
        first = states[0]
        if any("step_of_round" not in one for one in states):
            raise ValueError(
                f"method: local_sgd cannot continue from {sorted(first) or 'an empty state'}, which another method has "
                "written; set `method:` to that one, or start without the checkpoint"
            )
        if "all_ranks" not in state and state["size"] != self._queue.size:
            raise ValueError(
                f"method: the state is that of one of {state['size']} ranks, and there are {self._queue.size}; give "
                'those of all old ranks: {"all_ranks": [...]}'
            )
        for key, held in (("theta", self._theta), ("statistics", self._statistics.agreed)):
            saved = {name: tuple(value.shape) for name, value in first[key].items()}
            wanted = {name: tuple(value.shape) for name, value in held.items()}
            if saved != wanted:
                odd = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
                raise ValueError(f"method: the state is of another model: {key} differ in {', '.join(odd)}")
        merged = {"all_ranks": [one["exchange"] for one in states]}
        self._exchange.load_state_dict(merged if "all_ranks" in state else state["exchange"])
        for key, held in (("theta", self._theta), ("statistics", self._statistics.agreed)):
            for name, value in held.items():
                value.copy_(first[key][name])
        self._rounds, self._step_of_round = first["rounds"], first["step_of_round"]
        if self._outer is not None:
            self._outer.load_state_dict(first["outer"])
        if "all_ranks" in state:
            self._go_back()
        self._memory_norms = None

    def predicted_bytes(self) -> dict[str, int]:
        """Payload bytes that this rank sent in the last step, by level: none, but for the last step of a round."""
        return dict(self._predicted)

    def describe(self) -> str:
        """What is sent at the end of a round; and for each tensor the codec, its bytes dense and sent, and why."""
        sends = ", ".join(f"{count:,} bytes over {level}" for level, count in self._bytes_of_exchange().items())
        when = f"every {self._every} steps" if self._every > 1 else "after every step"
        return f"{when}, this rank sends {sends or 'nothing'}\n{self._exchange.describe()}"

    def _bytes_of_exchange(self) -> dict[str, int]:
        levels = defaultdict(int, self._exchange.predicted_bytes())
        for rank, count in self._statistics.sent_bytes(self._queue).items():
            levels[self._queue.meter.level_of(self._queue.peers[rank])] += count
        return dict(levels)

    def metrics(self) -> dict[str, float]:
        """`rounds` so far, `step_of_round`, the last `pseudo_gradient_norm`, and norms of what the feedback keeps."""
        if self._memory_norms is None:
            self._memory_norms = self._exchange.metrics()
        return {
            "rounds": float(self._rounds),
            "step_of_round": float(self._step_of_round),
            "pseudo_gradient_norm": self._pseudo_gradient_norm,
            **self._memory_norms,
        }

    def remove(self) -> None:
        """Average gradients again where DDP did. A round that is under way is undone: all ranks go back to theta.

        Each rank keeps the memory of its own optimizer: clear that if the ranks are to stay equal from here on.
        """
        self._hook.remove()
        self._average_gradients(True)
        if self._step_of_round:
            self._go_back()

    def _after_step(self) -> None:
        self._step_of_round += 1
        self._predicted = {}
        if self._step_of_round == self._every:
            self._end_round()

    @torch.no_grad()
    def _end_round(self) -> None:
        """theta <- outer(theta, mean over the ranks), and the model with it; or back to theta, and an error."""
        values = {name: _copy(p) for name, p in self._parameters.items()}
        if self._outer is not None:
            for name, value in values.items():
                # From theta as the model held it: rounding it to the model's dtype is not a step that a rank has taken.
                torch.sub(self._theta[name].to(self._parameters[name].dtype), value, out=value)
        if not (self._statistics.average(self._queue) and self._exchange.mean(values)):
            self._refuse_round()
        if self._outer is None:
            changes = [value.sub(self._theta[name]) for name, value in values.items()]
        else:
            changes = list(values.values())
        self._pseudo_gradient_norm = float(torch.nn.utils.get_total_norm(changes))
        for name, value in values.items():
            if self._outer is None:
                self._theta[name].copy_(value)
            else:
                self._outer.step(name, self._theta[name], value)
            self._parameters[name].copy_(self._theta[name])
        self._rounds += 1
        self._step_of_round = 0
        self._memory_norms = None
        self._predicted = self._bytes_of_exchange()

    def _refuse_round(self) -> NoReturn:
        held = [*self._parameters.values(), *self._statistics.live.values()]
        mine = torch.tensor([not are_finite(held)])
        told = self._queue.submit("control/local_sgd", lambda channel: channel.all_gather_same(mine)).wait()
        self._go_back()
        self._step_of_round = 0
        raise NonFiniteWeightsError([self._queue.peers[r] for r, bad in enumerate(told.flatten().tolist()) if bad])

    @torch.no_grad()
    def _go_back(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(self._theta[name])
        self._statistics.go_back()

    def _average_gradients(self, wanted: bool) -> None:
        """Whether the DDP module exchanges gradients and buffers: what its no_sync() switches for a while."""
        if self._silenced is not None:
            self._silenced.require_backward_grad_sync = wanted
            self._silenced.require_forward_param_sync = wanted


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
