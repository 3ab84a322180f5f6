"""What a trainer holds of a gossip run: hooks of the optimizer that drive the machine's scripts."""

from __future__ import annotations

import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer

from thinwire.comm.gossip.agent import Agent
from thinwire.comm.gossip.begin import begin
from thinwire.comm.gossip.machine import Machine
from thinwire.comm.gossip.optimizer_state import OptimizerState
from thinwire.comm.gossip.port import Script
from thinwire.comm.gossip.post.post import Post, drive
from thinwire.comm.meter import TrafficMeter
from thinwire.comm.same_weights import weights_digest

T = TypeVar("T")


class Gossip:
    """The handle of gossip(): a comm.method.LocalMethod.

    Nothing but the thread that calls optimizer.step(), or a member of this, touches weights.

    Args:
        agent: this machine's part, on a Post.
        machine: the model of this machine, which may be several ranks.
        algorithm: its kind.
        meet_deadline_s: how long this machine waits for others at the start.
        level_of: name of the level that joins this machine to another.
        graph: its name.
        text: what describe() says.
        recalibrate: puts the statistics of batch normalisation right after a merge.
    Attributes: absent, machines that had not come to the last state_dict(), the same set to each of the others.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        agent: Agent,
        post: Post,
        machine: Machine,
        *,
        optimizer_state: OptimizerState,
        algorithm: str,
        meet_deadline_s: float,
        level_of: Callable[[int], str],
        graph: str,
        text: str,
        recalibrate: Callable[[], object] | None = None,
    ) -> None:
        self._agent = agent
        self._post = post
        self._machine = machine
        self._algorithm = algorithm
        self._meet_deadline_s = meet_deadline_s
        self._level_of = level_of
        self._text = text
        self._graph = graph
        self._optimizer_state = optimizer_state
        self._recalibrate = recalibrate
        self.absent: frozenset[int] = frozenset()
        agent.after_merge = self._after_merge
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._run(agent.before_step())),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]

    @property
    def ended(self) -> bool:
        """Whether the run is over: the steps are taken, or somebody called stop().

        Where each machine keeps its own pace, the run is over for all when the first has taken the steps.
        """
        return self._agent.ended

    @property
    def step(self) -> int:
        """Optimizer steps that this machine has taken."""
        return self._agent.step

    @property
    def before_merge(self) -> Callable[[], None]:
        """Called before each merge, which replaces the weights."""
        return self._agent.before_merge

    @before_merge.setter
    def before_merge(self, call: Callable[[], None]) -> None:
        self._agent.before_merge = call

    @property
    def stopped(self) -> bool:
        """Whether it is over because somebody called stop()."""
        return self._agent.ended and self._agent.stopped

    @property
    def stopped_by(self) -> tuple[int, ...]:
        """The machines that have said so, in rounds all of them."""
        return self._agent.stopped_by() if self.stopped else ()

    @property
    def cut_every(self) -> int:
        """Steps between two moments at which cut_due is True on all machines at once, to save; 0 = none."""
        return self._agent.cut_every

    @cut_every.setter
    def cut_every(self, steps: int) -> None:
        self._agent.cut_every = steps

    @property
    def cut_due(self) -> bool:
        """Whether all machines have come to such a moment with the last step."""
        return self._agent.cut_due

    @property
    def is_merged(self) -> bool:
        """Whether this machine has taken no step since it took the mean of all machines alive."""
        return self._agent.is_merged

    @property
    def lost(self) -> frozenset[int]:
        """Machines that this one can reach no more."""
        return self._post.lost()

    @property
    def exposed_s(self) -> float:
        """Seconds for which this machine has waited for others."""
        return self._post.exposed_s

    @property
    def meter(self) -> TrafficMeter:
        """Where its payload bytes are counted."""
        return self._post.meter

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """Within this context the model holds the mean of all machines' weights; afterwards its own again. Collective.

        A machine that is not there within the deadline is left out, and holds its own.
        """
        merged = self._run(self._agent.average())
        with self._machine.replica.holding(merged.value), self._recalibrated():
            yield

    def begin(self, facts: Mapping[str, str]) -> str:
        """Among machines without a launcher: begin with the others, or enter the run that is under way.

        Call it once, after load_state_dict() if there is a checkpoint. A machine that enters has the weights of another
        one and half of its share; its optimizer is the caller's business.

        Args:
            facts: what must be equal on all machines besides the weights, by name, such as settings and data.
        Returns: what has happened, if it has entered, or "".
        Raises:
            ValueError: the machines begin with different facts or weights, or the algorithm is not one to enter.
            PeerLostError: nobody has given this machine a share.
        """
        digests = {name: hashlib.blake2b(text.encode(), digest_size=8).digest() for name, text in facts.items()}
        digests["weights"] = weights_digest(self._machine.tensors())
        if self._run(begin(self._post, self._agent.step, digests, deadline_s=self._meet_deadline_s)):
            return ""
        entry = self._run(self._agent.enter())
        return (
            f"enters the run after {self._agent.step} steps with the weights of machine {entry.donor} and a share of "
            f"{entry.mass:g} in the mean"
        )

    def merge(self) -> None:
        """All machines take the mean of their weights, beside what the schedule says. Collective.

        Raises:
            OwnWeightsError: this machine's weights are not finite; the others have merged without them.
        """
        self._run(self._agent.merge())

    def stop(self) -> None:
        """Let the run end on all machines within a step or two, without a final merge; any one of them may call it.

        Raises:
            ValueError: the model is sharded over the ranks of a machine, which would not all hear of it at one step.
        """
        if self._machine.group is not None:
            raise ValueError(
                "stop: the model is sharded; let all ranks of all machines end after the same step instead"
            )
        self._agent.stop()

    def state_dict(self) -> dict[str, Any]:
        """Weights (fp32), step, and what the algorithm remembers, at a cut: nothing is on the wire. Collective.

        What was under way is finished first, so with `overlap` a run that has saved goes on with other last bits than
        one that has not; it, and one that resumes from there, go on alike. The optimizer's state is the caller's.
        """
        present = self._run(self._agent.cut())
        self.absent = frozenset(range(self._post.size)) - present
        return {"gossip": self._facts(), **self._agent.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what state_dict() gave on this machine, weights included.

        After another number of machines, {"all_ranks": [state of old rank 0, ...]}: all begin at the mean of the old
        ones' weights, and algorithms anew. The optimizers are the caller's business.

        Raises:
            ValueError: the state is another method's, another model's, another algorithm's, or that of another number
                of machines.
        """
        states = state.get("all_ranks", [state])
        if any("gossip" not in one for one in states):
            raise ValueError(
                f"method: gossip cannot continue from {sorted(states[0]) or 'an empty state'}, which another method "
                "has written; set `method:` to that one, or start without the checkpoint"
            )
        facts = self._facts()
        states = [one for one in states if list(one["gossip"]["shard"]) == facts["shard"]]
        if not states:
            raise ValueError(
                f"method: the state has no shard {facts['shard'][0]} of {facts['shard'][1]}, which this rank holds; "
                "shard the model as it was, or start without the checkpoint"
            )
        saved = states[0]["gossip"]
        if saved["tensors"] != facts["tensors"]:
            raise ValueError(
                f"method: the state is of another model, or of other statistics: its weights have {saved['tensors']} "
                f"elements by tensor, this model's {facts['tensors']}"
            )
        if "all_ranks" in state:
            self._begin_at_the_mean(states)
            return
        for what in ("size", "algorithm", "graph"):
            if saved[what] != facts[what]:
                raise ValueError(
                    f"method.{what}: {saved[what]} in the state, {facts[what]} now (graph: auto may choose another one "
                    "each time: name the one of the state). Give the same, or the states of all old machines, which "
                    'are then merged: {"all_ranks": [...]}'
                )
        self._agent.load_state_dict(state)

    def predicted_bytes(self) -> dict[str, int]:
        """Payload bytes that this machine sent in the last step, by level; before it, in the next one."""
        levels: dict[str, int] = defaultdict(int)
        for rank, count in self._agent.predicted_bytes.items():
            levels[self._level_of(rank)] += count
        return {level: count for level, count in levels.items() if count}

    def describe(self) -> str:
        """The graph and why, what it does to disagreement, the schedule, and what an exchange sends."""
        return self._text

    def metrics(self) -> dict[str, float]:
        """Those of the algorithm and the machine (Agent.metrics).

        Besides, so far, bytes by edge, `sent_to/RANK`, and seconds by who was waited for, `waited_for_s/RANK`.
        """
        edges = {f"sent_to/{rank}": float(count) for rank, count in sorted(self._post.sent_bytes.items()) if count}
        waited = {
            f"waited_for_s/{rank}": seconds
            for rank, seconds in sorted(self._post.waited_for_s.items())
            if rank != self._post.rank
        }
        return {**self._agent.metrics(), **edges, **waited}

    def remove(self) -> None:
        """Stop exchanging, and leave the others; this machine keeps the weights it has."""
        for hook in self._hooks:
            hook.remove()
        self._post.close()

    def _after_step(self) -> None:
        replica = self._machine.replica
        replica.spoilt = self._machine.is_spoilt()
        try:
            self._run(self._agent.after_step())
        finally:
            replica.spoilt = False

    def _run(self, script: Script[T]) -> T:
        with torch.no_grad():
            return drive(script, self._post)

    def _after_merge(self, agent: Agent, number: int) -> Script[None]:
        yield from self._optimizer_state.merged(agent, number)
        if self._recalibrate is not None:
            self._recalibrate()

    @contextlib.contextmanager
    def _recalibrated(self) -> Iterator[None]:
        """Within this context the statistics fit the weights; afterwards they are as before."""
        if self._recalibrate is None:
            yield
            return
        kept = {name: buffer.clone() for name, buffer in self._machine.buffers.items()}
        self._recalibrate()
        try:
            yield
        finally:
            for name, buffer in self._machine.buffers.items():
                buffer.copy_(kept[name])

    def _facts(self) -> dict[str, Any]:
        return {
            "size": self._post.size,
            "shard": list(self._machine.shard),
            "tensors": self._machine.numels(),
            "algorithm": self._algorithm,
            "graph": self._graph,
        }

    def _begin_at_the_mean(self, states: Sequence[Mapping[str, Any]]) -> None:
        masses = [float(one["mass"]) for one in states]
        total = torch.zeros_like(states[0]["weights"], dtype=torch.float64)
        for one, mass in zip(states, masses, strict=True):
            total.add_(one["weights"], alpha=mass)
        step = max(int(one["step"]) for one in states)
        self._agent.go_on(step, max(int(one["meeting"]) for one in states), (total / sum(masses)).to(torch.float32))
        self._agent.algorithm.merged()
