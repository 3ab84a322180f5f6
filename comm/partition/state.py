"""What a partitioned optimizer remembers, as a tree for checkpoints, and back on any other ranks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from thinwire.comm.partition.levels import Levels
from thinwire.comm.partition.named_states import (
    has_states,
    localize,
    name_states,
    refuse_other_names,
    stand_in,
    take_states,
)
from thinwire.comm.partition.placement import Placement

if TYPE_CHECKING:
    from thinwire.comm.partition.optimizer import PartitionedUnit

_SHARED = ("state", "param_groups", "masters", "steps", "draws", "feedback")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Owned:
    """A trained parameter: its unit, its name there, its master, and which rows this rank owns."""

    unit: PartitionedUnit
    name: str
    parameter: nn.Parameter
    rows: tuple[int, int]


class PartitionedState:
    """See PartitionedOptimizer.state_dict() for the tree."""

    def __init__(
        self, units: Sequence[PartitionedUnit], inner: Optimizer, levels: Levels, placement: Placement
    ) -> None:
        self._units = units
        self._inner = inner
        self._levels = levels
        self._placement = placement

    def save(self, steps: int, draws: int) -> dict[str, Any]:
        """The tree; its tensors are those in use."""
        self._follow()
        masters = {name: one.parameter.detach() for name, one in self._owned().items() if one.unit.own.separate}
        memories = {unit.unit.name: dict(unit.gradients.memories) for unit in self._units if unit.gradients.memories}
        return {**name_states(self._inner, self._names()), **self._rest(masters, memories, steps, draws)}

    def template(self) -> dict[str, Any]:
        """The tree after a step, of zeros."""
        self._follow()
        if has_states(self._inner):
            present = name_states(self._inner, self._names())
            state = {
                name: {key: torch.zeros_like(v) if isinstance(v, Tensor) else v for key, v in own.items()}
                for name, own in present["state"].items()
            }
            states = {**present, "state": state}
        else:
            states = self._states_after_a_step()
        masters = {
            name: torch.zeros_like(one.parameter) for name, one in self._owned().items() if one.unit.own.separate
        }
        memories = {
            unit.unit.name: {
                level: torch.zeros(count, device=self._device)
                for level, count in unit.gradients.memory_counts().items()
            }
            for unit in self._units
            if unit.gradients.memory_counts()
        }
        return {**states, **self._rest(masters, memories, 0, 0)}

    def load(self, state: Mapping[str, Any]) -> tuple[tuple[int, int], bool]:
        """Take a tree back; returns steps and draws, and whether the weights must be spread anew."""
        if "all_ranks" in state:
            raise ValueError(
                "load_state_dict: these are the states of all ranks of another job, each with its own shards; save "
                'all but "own" of state_dict() as DTensors, which any number of ranks can load'
            )
        if lacking := [key for key in _SHARED if key not in state]:
            raise ValueError(
                f"load_state_dict: {', '.join(lacking)} is missing: this is not the state of a partitioned optimizer; "
                "load what its own state_dict() gave"
            )
        for unit in self._units:
            unit.own.are_restored = False  # what was loaded before is of no more interest
        self._follow()
        owned = self._owned()
        if state["masters"]:
            refuse_other_names(state["masters"], owned)
        loaded = {
            name: localize(value, f"the master of {name}", owned[name].parameter, owned[name].rows)
            for name, value in state["masters"].items()
        }
        take_states(self._inner, state, self._names(), {name: one.rows for name, one in owned.items()})
        for name, master in loaded.items():
            own = owned[name].unit.own
            own.begin_from(owned[name].name, cast(DTensor, master).to_local())
            own.are_restored = True
        self._take_own(str(state["feedback"]), state.get("own", {}))
        must_spread = bool(loaded) and not all(unit.own.separate for unit in self._units)
        return (int(state["steps"]), int(state["draws"])), must_spread

    def _states_after_a_step(self) -> dict[str, Any]:
        names = self._names()
        groups = [[nn.Parameter(torch.zeros_like(p)) for p in group["params"]] for group in self._inner.param_groups]
        stands = {
            id(stand): names[id(master)]
            for own, group in zip(groups, self._inner.param_groups, strict=True)
            for stand, master in zip(own, group["params"], strict=True)
        }
        return name_states(stand_in(self._inner, groups), stands)

    def _rest(
        self, masters: Mapping[str, Tensor], memories: Mapping[str, Mapping[str, Tensor]], steps: int, draws: int
    ) -> dict[str, Any]:
        own = {self._rank: {"place": self._place(), "memories": memories}} if memories else {}
        kept = self._topology() if memories else ""
        return {"masters": dict(masters), "steps": steps, "draws": draws, "feedback": kept, "own": own}

    def _take_own(self, written: str, saved: Mapping[str, Any]) -> None:
        for unit in self._units:
            unit.gradients.memories.clear()
        if not written:
            return
        mine = saved.get(self._rank, {"place": "other ranks"})
        if (written, mine["place"]) != (self._topology(), self._place()):
            _log.warning(
                "load_state_dict: dropped what error feedback has kept: it was written under %s, and this is %s",
                written,
                self._topology(),
            )
            return
        for unit in self._units:
            for level, memory in mine["memories"].get(unit.unit.name, {}).items():
                unit.gradients.memories[level] = memory.to(self._device, copy=True)

    def _follow(self) -> None:
        """Masters that weights have left behind are not worth keeping, and those on the meta device have no values."""
        for unit in self._units:
            unit.own.follow()
        if any(one.parameter.is_meta for one in self._owned().values()):
            raise ValueError(
                "model: its weights are still on the meta device; call model.to_empty(device=...) before state_dict(), "
                "state_template() and load_state_dict() of its optimizer"
            )

    def _owned(self) -> dict[str, _Owned]:
        owner = self._levels.number(self._levels.rank, self._placement.optim)
        return {
            _clean(name): _Owned(unit, name, parameter, unit.ownership.rows(name, owner))
            for unit in self._units
            for name, parameter in unit.masters.items()
        }

    def _names(self) -> dict[int, str]:
        return {id(one.parameter): name for name, one in self._owned().items()}

    @property
    def _rank(self) -> str:
        return f"rank{self._levels.rank}"

    @property
    def _device(self) -> torch.device:
        return next(iter(self._owned().values())).parameter.device

    def _place(self) -> list[int]:
        return list(self._levels.digits[self._levels.rank])

    def _topology(self) -> str:
        """Equal where the ranks have the same slices of everything."""
        levels = " ".join(f"{n}={f}" for n, f in zip(self._levels.names, self._levels.fanouts, strict=True))
        depths = (self._placement.params, self._placement.grads, self._placement.optim)
        sharded = ", ".join(str(self._levels.size(depth)) for depth in depths)
        shapes = sha256(repr([(unit.unit.name, unit.ownership.shapes) for unit in self._units]).encode()).hexdigest()
        feedback = sorted({level for unit in self._units for level in unit.gradients.memory_counts()})
        return (
            f"levels {levels}, params, grads, optim over {sharded} ranks, {len(self._units)} units ({shapes[:8]}), "
            f"feedback on {', '.join(feedback) or 'no level'}"
        )


def _clean(name: str) -> str:
    """A parameter's name without the wrappers that may come and go between runs."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
