"""How an optimizer gets machines that come and go."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from thinwire.comm.onebyte.log import Log
from thinwire.comm.onebyte.membership.elastic import Membership
from thinwire.comm.onebyte.membership.settings import MembershipSettings

if TYPE_CHECKING:
    from thinwire.comm.onebyte.replica import Replica


def elastic(settings: MembershipSettings) -> Callable[[bytes, Log, Replica], Membership]:
    """For OneByteSPSA(join=...): this machine founds a run, joins it or goes on with it, as the settings say.

    The number of directions per round is settings.samples, not the optimizer's.

        settings = MembershipSettings(listen="10.0.0.2:7000", contacts=("10.0.0.1:7000",))
        optimizer = tw.OneByteSPSA(model.named_parameters(), lr=1e-6, log="run.log", join=elastic(settings))
    """

    def join(manifest: bytes, log: Log, replica: Replica) -> Membership:
        return Membership(
            manifest,
            log,
            replica,
            settings,
            base_hash=replica.base_hash,
            snapshot_every=replica.manifest.numerics.snapshot_every,
        )

    return join
