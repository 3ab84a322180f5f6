"""`feedback:` in YAML: one of the kinds with its settings, or just its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Field, TypeAdapter

from thinwire.comm.compress.feedback.classic import EF, NoFeedback
from thinwire.comm.compress.feedback.dgc import DGC
from thinwire.comm.compress.feedback.econtrol import EControl
from thinwire.comm.compress.feedback.ef21 import EF21, EF21BC
from thinwire.comm.compress.feedback.ef21_variants import EF21PP, EF21SGDM
from thinwire.comm.compress.feedback.ef21_weighted import EF21W
from thinwire.comm.compress.feedback.protocol import Feedback, Place


def _from_name(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


AnyFeedback: TypeAlias = Annotated[
    Annotated[
        NoFeedback | EF | EF21 | EF21W | EF21SGDM | EF21BC | EF21PP | EControl | DGC, Field(discriminator="kind")
    ],
    BeforeValidator(_from_name),
]
"""A field of this type takes settings, a mapping with `kind`, or a kind's name for its defaults."""

_ANY: TypeAdapter[AnyFeedback] = TypeAdapter(AnyFeedback)


def parse_feedback(value: str | Mapping[str, Any] | AnyFeedback) -> AnyFeedback:
    """Settings from settings, a mapping, or a kind's name: "ef21_sgdm" is EF21SGDM().

    Raises:
        ValueError: an unknown kind or setting; the message names it and what is allowed.
    """
    return _ANY.validate_python(value)


def build_feedback(
    feedback: str | Mapping[str, Any] | AnyFeedback,
    *,
    rank: int,
    size: int,
    seed: int = 0,
    learning_rate: Callable[[str], float] | None = None,
) -> Feedback:
    """The feedback of one rank, with no memory yet.

    Args:
        feedback: as in parse_feedback().
        rank, size: within the group.
        seed: of the run, the same on every rank.
        learning_rate: that of a parameter in the present step, by its name; EF(units="update") needs it.
    Raises:
        ValueError: unknown settings, or settings that do not fit the rest.
    """
    return parse_feedback(feedback).build(Place(rank, size, seed, learning_rate))
