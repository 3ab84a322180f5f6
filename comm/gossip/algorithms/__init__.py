"""Averaging algorithms: one file each. What they have in common is algorithm.py."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Field

from thinwire.comm.gossip.algorithms.acid import A2CiD2Settings
from thinwire.comm.gossip.algorithms.ad_psgd import ADPSGDSettings
from thinwire.comm.gossip.algorithms.choco import ChocoSettings
from thinwire.comm.gossip.algorithms.d2 import D2Settings
from thinwire.comm.gossip.algorithms.dadao import DADAOSettings
from thinwire.comm.gossip.algorithms.decentlam import DecentLaMSettings
from thinwire.comm.gossip.algorithms.dpsgd import DPSGDSettings
from thinwire.comm.gossip.algorithms.gradient_tracking import GradientTrackingSettings
from thinwire.comm.gossip.algorithms.modest import ModestSettings
from thinwire.comm.gossip.algorithms.noloco import NoLoCoSettings
from thinwire.comm.gossip.algorithms.sgp import SGPSettings
from thinwire.comm.gossip.algorithms.slowmo import SlowMoSettings
from thinwire.comm.gossip.algorithms.sparta import SpartaSettings
from thinwire.comm.gossip.algorithms.variance_corrected import VarianceCorrectedSettings

EachAlgorithm: TypeAlias = (
    DPSGDSettings
    | GradientTrackingSettings
    | D2Settings
    | DecentLaMSettings
    | SlowMoSettings
    | NoLoCoSettings
    | ModestSettings
    | VarianceCorrectedSettings
    | SGPSettings
    | ADPSGDSettings
    | A2CiD2Settings
    | DADAOSettings
    | ChocoSettings
    | SpartaSettings
)


def from_name(given: Any) -> Any:
    """Settings of a kind with its defaults, where only its name is given."""
    return {"kind": given} if isinstance(given, str) else given


AnyAlgorithm: TypeAlias = Annotated[EachAlgorithm, Field(discriminator="kind"), BeforeValidator(from_name)]
"""Settings of any algorithm, by `kind`; a string is the kind with its defaults."""
