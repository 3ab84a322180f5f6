"""Rates, times and probabilities as people write them: 100mbit, 20ms, 0.1%."""

from __future__ import annotations

import math
import re

_RATE_UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}
_TIME_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z%/]*)")


def _split(setting: str, text: str, example: str) -> tuple[float, str]:
    match = _NUMBER.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(f"{setting}: cannot read {text!r}; write a number with its unit, such as {example}")
    return float(match[1]), match[2]


def parse_rate(text: str, setting: str = "--rate") -> float:
    """Bits per second of "100mbit", "1gbit", "2.5Mbit/s" (SI prefixes). Raises ValueError."""
    number, unit = _split(setting, text, "100mbit or 1gbit")
    unit = unit.removesuffix("/s")
    if unit not in _RATE_UNITS:
        allowed = ", ".join(_RATE_UNITS)
        raise ValueError(f"{setting}: {text!r} needs a unit, one of {allowed} (bits per second); e.g. 100mbit")
    rate_bps = number * _RATE_UNITS[unit]
    if rate_bps < 8000:
        raise ValueError(f"{setting}: {text!r} is below 8kbit, too slow for one packet a second; e.g. 100mbit")
    return rate_bps


def parse_delay(text: str, setting: str = "--delay", limit_s: float = 10.0) -> float:
    """Seconds of "20ms", "500us", "0.1s"; a bare 0 is allowed. Raises ValueError."""
    number, unit = _split(setting, text, "20ms")
    if number == 0 and not unit:
        return 0.0
    if unit not in _TIME_UNITS:
        raise ValueError(f"{setting}: {text!r} needs a unit, one of {', '.join(_TIME_UNITS)}; e.g. 20ms")
    delay_s = number * _TIME_UNITS[unit]
    if delay_s > limit_s:
        raise ValueError(f"{setting}: {text!r} is above the {limit_s:g} s allowed here")
    return delay_s


def parse_loss(text: str, setting: str = "--loss") -> float:
    """Probability of "0.1%" or "0.001". Raises ValueError."""
    number, unit = _split(setting, text, "0.1%")
    if unit not in ("", "%"):
        raise ValueError(f"{setting}: {text!r} is neither a percentage (0.1%) nor a probability (0.001)")
    loss = number / 100 if unit else number
    if not 0 <= loss < 1:
        raise ValueError(f"{setting}: {text!r} is a probability of {loss:g}; allowed is 0 up to, not including, 1")
    return loss


def format_rate(rate_bps: float | None) -> str:
    """The inverse of parse_rate, for messages: "100mbit", "unlimited" for None."""
    if rate_bps is None:
        return "unlimited"
    exponent = min(4, max(0, int(math.log10(rate_bps) // 3)))
    return f"{rate_bps / 1000**exponent:g}{list(_RATE_UNITS)[exponent]}"


def format_bytes(count: float) -> str:
    """A byte count with an SI prefix: "12.3 MB"."""
    for prefix in ("", "k", "M", "G"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if not prefix else f"{count:.1f} {prefix}B"
        count /= 1000
    return f"{count:.2f} TB"
