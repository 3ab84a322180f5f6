"""The mode that settings name."""

from __future__ import annotations

from thinwire.comm.balance.modes.mode import Mode, Setting
from thinwire.comm.balance.modes.own import Own
from thinwire.comm.balance.modes.prefix import Prefix
from thinwire.comm.balance.modes.stale import Stale
from thinwire.comm.balance.settings import BalanceSettings


def build_mode(settings: BalanceSettings, setting: Setting) -> Mode:
    """A mode that has seen nothing yet."""
    if settings.scope == "micro":
        return Own(setting)
    match settings.timing:
        case "sync":
            return Prefix(setting)
        case "late":
            return Prefix(setting, late=True)
        case "carry":
            return Prefix(setting, carry=True)
        case "stale":
            return Stale(setting)
        case "ema":
            assert settings.decay is not None
            return Stale(setting, decay=settings.decay)
        case other:
            raise NotImplementedError(other)
