"""What is sent for a group of gradients: feedback, compressor and collective, as one transaction a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.channel import Channel
from thinwire.comm.compress.collective import Collective, Job
from thinwire.comm.compress.collectives.flat import copy_back, joined
from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.contribution_error import ContributionError
from thinwire.comm.compress.draw import Draw
from thinwire.comm.compress.feedback import Feedback
from thinwire.comm.compress.lane import Lane
from thinwire.comm.compress.routes import Route, is_global
from thinwire.comm.finite import are_finite
from thinwire.comm.two_shot import TwoShotMean


class Pipeline:
    """x_r <- the mean over the ranks of what the feedback and C make of x_q, for named tensors, on every rank r.

    One step: begin_step(), then exchange() for each group on the CommQueue's thread, then end_step(). Nothing is
    remembered of a step before end_step(True). Knows neither DDP nor any other trainer.

    Tensors on a dense route are averaged in fp32. Feedbacks that give all tensors a state of their own (momentum, an
    estimate) see them too, with C the identity; none and ef would have nothing to remember of them, and do not.

    Args:
        shapes: of all tensors, by name; the same on every rank, as is their order.
        routes: the way of each tensor.
        feedback: of this rank.
        build: makes the collective of a compressor.
        seed: of all that is drawn at random.
        start_step: this many first steps are sent dense.

    Attributes: steps, the finished ones; skipped, those of them that were rolled back; error, what is not sent.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        routes: Mapping[str, Route],
        feedback: Feedback,
        build: Callable[[Compressor], Collective],
        *,
        seed: int,
        start_step: int,
        feedback_sees_dense: bool,
    ) -> None:
        self.shapes = shapes
        self.feedback = feedback
        self.build = build
        self.error = ContributionError()
        self.steps = 0
        self.skipped = 0
        self._seed = seed
        self._start_step = start_step
        self._feedback_sees_dense = feedback_sees_dense
        self._dense = TwoShotMean(torch.float32)
        self._step = 0  # the present one, or the last
        self._scale = 1.0
        self.reroute(routes)

    def reroute(self, routes: Mapping[str, Route]) -> None:
        """Send each tensor another way from the next step on. Collectives begin anew; the feedback keeps its memory."""
        self.routes = routes
        compressors = dict.fromkeys(route.compressor for route in routes.values() if route.compressor is not None)
        self._collectives = {compressor: (compressor, self.build(compressor)) for compressor in compressors}

    def begin_step(self, scale: float = 1.0) -> None:
        """Before the first group of a step.

        Args:
            scale: the loss scale by which the tensors come, and are to leave, multiplied.
        """
        self._step, self._scale = self.steps, scale
        self.feedback.begin_step(self._step, scale)
        self.error.begin_step(self._step)
        for final, (present, _) in self._collectives.items():
            if (wanted := self._with_density(final)) != present:
                self._collectives[final] = wanted, self.build(wanted)

    def exchange(self, channel: Channel, tensors: Mapping[str, Tensor], factor: float = 1.0) -> bool:
        """Replace the tensors of one group by what the optimizer shall see. On the CommQueue's thread.

        Args:
            tensors: fp32, bf16 or fp16, in any layout.
            factor: to multiply them by first: clipping.
        Returns: whether those of all ranks were finite; the same on every rank. If not, some are NaN or infinite now.
        """
        flat = {name: x.float().contiguous() for name, x in tensors.items()}
        if factor != 1.0:
            torch._foreach_mul_(list(flat.values()), factor)
        finite = True
        for compressor, names in self._lanes(flat).items():
            if compressor is None:
                finite &= self._exchange_dense(channel, names, [flat[name] for name in names])
            else:
                finite &= self._exchange_compressed(
                    channel, self._collectives[compressor][1], names, [flat[name] for name in names]
                )
        for name, x in tensors.items():
            if flat[name] is not x:
                x.copy_(flat[name])
        # What is finite in fp32 and without the scale may not be so as it leaves; the same on every rank.
        leaving = [x for x in tensors.values() if self._scale != 1.0 or x.dtype != torch.float32]
        return finite and are_finite(leaving)

    def end_step(self, finite: bool) -> None:
        """After the last group: keep the new state if all of them were finite, otherwise none of it."""
        self.steps += 1
        self.skipped += not finite
        stateful: list[Feedback | Collective] = [self.feedback, *(c for _, c in self._collectives.values())]
        for one in stateful:
            if finite:
                one.commit()
            else:
                one.rollback()
        for _, collective in self._collectives.values():
            for name, offset, error in collective.surrendered():
                self.feedback.give_back(name, offset, error)

    def sent_bytes(self, groups: Iterable[Sequence[str]], rank: int, size: int) -> dict[int, int]:
        """Payload bytes that `rank` sends in a step with these groups, by receiver: of the last step, or expected."""
        total = dict.fromkeys((r for r in range(size) if r != rank), 0)
        for group in groups:
            for lane in self.lanes(group):
                for r, count in lane.sent_bytes(rank, size).items():
                    total[r] += count
        return total

    def lanes(self, group: Iterable[str]) -> list[Lane]:
        """The calls that exchange a group in the present step, one after another."""
        return [
            Lane({name: self.shapes[name] for name in names}, self._collectives[c][1] if c is not None else self._dense)
            for c, names in self._lanes(group).items()
        ]

    def exchanged_together(self, groups: Iterable[Sequence[str]]) -> list[list[str]]:
        """The groups of names that are sent: those given, unless the entries of all tensors compete with each other."""
        return [list(self.shapes)] if self.takes_all_at_once else [list(group) for group in groups]

    def remembered(self) -> list[str]:
        """Names of the tensors that the feedback keeps something for."""
        everything = self._feedback_sees_dense
        return [name for name, route in self.routes.items() if everything or route.compressor is not None]

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on."""
        return {
            "steps": self.steps,
            "feedback": self.feedback.state_dict(),
            "collectives": {
                _label(final): {"compressor": _label(present), "state": collective.state_dict()}
                for final, (present, collective) in self._collectives.items()
            },
        }

    @property
    def takes_all_at_once(self) -> bool:
        """Whether the tensors of all groups must be exchanged in one call: their entries compete with each other."""
        return any(is_global(compressor) for compressor in self._collectives)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what state_dict() gave on this rank of as many ranks.

        Raises:
            ValueError: it was saved with another compressor or feedback.
        """
        self._load(state, {final: saved["state"] for final, saved in self._collectives_of(state).items()})

    def load_states_of_all_ranks(self, states: Sequence[Mapping[str, Any]], rank: int, size: int) -> None:
        """Begin with the mean of the memories of all ranks of a group of another size.

        Args:
            states: what state_dict() gave on each of them, in rank order.
            rank, size: of this rank, and its group.
        Raises:
            ValueError: as load_state_dict().
        """
        old = [self._collectives_of(state) for state in states]
        merged = {
            final: collective.merge([saved[final]["state"] for saved in old], rank, size)
            for final, (_, collective) in self._collectives.items()
        }
        feedback = self.feedback.merge([state["feedback"] for state in states])
        self._load({**states[0], "feedback": feedback}, merged)

    def _load(self, state: Mapping[str, Any], collectives: Mapping[Compressor, Mapping[str, Any]]) -> None:
        self.feedback.load_state_dict(state["feedback"])
        for final, saved in self._collectives_of(state).items():
            present = type(final).model_validate_json(saved["compressor"])
            self._collectives[final] = present, self.build(present)
            self._collectives[final][1].load_state_dict(collectives[final])
        self.steps = state["steps"]

    def _collectives_of(self, state: Mapping[str, Any]) -> dict[Compressor, Mapping[str, Any]]:
        by_label = {_label(final): final for final in self._collectives}
        if set(state["collectives"]) != set(by_label):
            raise ValueError(
                f"method.compressor: the checkpoint was written with {' and '.join(state['collectives']) or 'none'}, "
                f"but this run has {' and '.join(by_label) or 'none'}; give the same compressor and dense_below"
            )
        return {by_label[label]: saved for label, saved in state["collectives"].items()}

    def _lanes(self, names: Iterable[str]) -> dict[Compressor | None, list[str]]:
        """The names of a group by compressor, in the order that all ranks share."""
        lanes: dict[Compressor | None, list[str]] = {}
        for name in names:
            compressor = None if self._step < self._start_step else self.routes[name].compressor
            lanes.setdefault(compressor, []).append(name)
        return lanes

    def _exchange_dense(self, channel: Channel, names: Sequence[str], tensors: Sequence[Tensor]) -> bool:
        if not self._feedback_sees_dense:
            return self._mean_dense(channel, tensors)
        weights = self.feedback.weights(channel.size)
        weight = 1.0 if weights is None else weights[channel.rank]
        sent = []
        for name, x in zip(names, tensors, strict=True):
            own = self.feedback.before(name, x)
            sent.append((own.clone() if weight else torch.zeros_like(own)).view(-1))
            torch.mul(own, weight, out=x)
        finite = self._mean_dense(channel, tensors)
        if finite:
            for name, own, x in zip(names, sent, tensors, strict=True):
                self.feedback.after(name, own, x)
        return finite

    def _mean_dense(self, channel: Channel, tensors: Sequence[Tensor]) -> bool:
        """NaN and Inf of any rank are in the mean, and so every rank sees them."""
        flat = joined(tensors)
        self._dense(channel, flat)
        copy_back(flat, tensors)
        return are_finite([flat])

    def _exchange_compressed(
        self, channel: Channel, collective: Collective, names: Sequence[str], tensors: Sequence[Tensor]
    ) -> bool:
        found = [self.feedback.memories(name, x) for name, x in zip(names, tensors, strict=True)]
        memories = [memory for memory in found if memory is not None]
        inputs = tensors if memories else [self.feedback.before(n, x) for n, x in zip(names, tensors, strict=True)]
        job = Job(
            names=names,
            inputs=inputs,
            outputs=tensors,
            draws=[Draw(self._seed, self._step, name, channel.rank) for name in names],
            memories=memories or None,
            weights=self.feedback.weights(channel.size),
        )
        takes_part = job.weights is None or bool(job.weights[channel.rank])
        kept = self.error.before(inputs, job.memories) if takes_part else ()
        sent = collective.mean(channel, job)
        if sent is None:
            return False
        if takes_part:
            self.error.after(kept, job.memories, sent)
        for i, (name, x) in enumerate(zip(names, tensors, strict=True)):
            self.feedback.after(name, None if memories else sent[i], x)
        return True

    def _with_density(self, compressor: Compressor) -> Compressor:
        """The compressor of this step: that of the settings, or a denser one while the feedback warms up."""
        final = getattr(compressor, "density", None)
        if final is None or (density := self.feedback.density(final)) == final:
            return compressor
        return compressor.model_copy(update={"density": density})


def _label(compressor: Compressor) -> str:
    """The settings as text: what a state belongs to."""
    return compressor.model_dump_json()
