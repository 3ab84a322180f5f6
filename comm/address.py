"""Addresses as people write them: host:port."""

from __future__ import annotations


def split_address(address: str) -> tuple[str, int]:
    """("host", port) of "host:port"; an IPv6 host stands in brackets. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{address!r}: write an IPv6 host in brackets, as in [::1]:7000")
    if not colon or not port.isascii() or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address!r} is no address; write host:port, such as 10.0.0.1:7000")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """The inverse of split_address()."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
