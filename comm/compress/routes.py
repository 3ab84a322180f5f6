"""Which way each tensor goes: through the compressor, or dense in fp32, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import TypeAdapter

from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors import AnyCompressor

_ANY: TypeAdapter[Compressor] = TypeAdapter(AnyCompressor)
_LONGEST_TABLE = 40  # rows; a model with more tensors gets one row for each group of equals


@dataclass(frozen=True)
class Route:
    """How one tensor is sent.

    Attributes: compressor, None = dense in fp32; reason, for people.
    """

    compressor: Compressor | None
    reason: str

    @property
    def codec(self) -> str:
        """The compressor's name."""
        return "dense" if self.compressor is None else str(getattr(self.compressor, "kind", "?"))

    def payload_bytes(self, shape: torch.Size) -> int:
        """Bytes of one contribution, as the compressor states or expects them."""
        return 4 * shape.numel() if self.compressor is None else self.compressor.payload_bytes(shape)


def choose_routes(shapes: Mapping[str, torch.Size], compressor: Compressor, *, dense_below: int) -> dict[str, Route]:
    """One compressor for all tensors but those that are too small for it, or that it would not make smaller.

    A compressor that rounds each element by itself (bf16, fp16) takes the small tensors too: nothing that they share
    with others can hurt them. So does one that ranks the entries of all tensors together.

    Args:
        dense_below: tensors of fewer elements go dense.
    """
    together = (compressor.elementwise and compressor.granule == 1) or is_global(compressor)
    return {name: _choose(shape, compressor, 0 if together else dense_below) for name, shape in shapes.items()}


def is_global(compressor: Compressor) -> bool:
    """Whether the compressor takes all tensors of a step joined into one."""
    return getattr(compressor, "scope", "tensor") == "global"


def _choose(shape: torch.Size, compressor: Compressor, dense_below: int) -> Route:
    kind, numel = getattr(compressor, "kind", ""), shape.numel()
    if kind == "none":
        return Route(None, "no compression is asked for")
    if numel < dense_below:
        return Route(None, f"fewer than {dense_below:,} elements")
    if kind == "lowrank" and len(shape) < 2:
        return Route(None, "lowrank needs two dimensions")
    if not is_global(compressor) and compressor.payload_bytes(shape) >= 4 * numel:
        return Route(None, f"{kind} would not make it smaller")
    return Route(compressor, _describe(compressor))


def _describe(compressor: Compressor) -> str:
    given = compressor.model_dump(exclude_defaults=True)
    given.pop("kind", None)
    return ", ".join(f"{key} {value}" for key, value in given.items()) or "with its defaults"


def routes_to_plain(routes: Mapping[str, Route]) -> dict[str, list[str]]:
    """For a checkpoint: of each tensor the compressor as JSON ("" = dense) and the reason."""
    return {
        name: ["" if route.compressor is None else route.compressor.model_dump_json(), route.reason]
        for name, route in routes.items()
    }


def routes_from_plain(plain: Mapping[str, Sequence[str]]) -> dict[str, Route]:
    """The routes of routes_to_plain()."""
    return {
        name: Route(_ANY.validate_json(compressor) if compressor else None, reason)
        for name, (compressor, reason) in plain.items()
    }


def describe_routes(shapes: Mapping[str, torch.Size], routes: Mapping[str, Route]) -> str:
    """A table: for each tensor its shape, the codec, bytes dense, bytes of one contribution, and the reason.

    Where there are many tensors, those that differ in their numbers only ("blocks.3.") share a row.
    """
    rows: dict[tuple[str, ...], list[int]] = {}
    for name, shape in shapes.items():
        route = routes[name]
        label = name if len(shapes) <= _LONGEST_TABLE else _without_numbers(name)
        key = (label, "x".join(map(str, shape)) or "scalar", route.codec, route.reason)
        totals = rows.setdefault(key, [0, 0, 0])
        for i, count in enumerate((1, 4 * shape.numel(), route.payload_bytes(shape))):
            totals[i] += count
    header = ("tensor", "shape", "codec", "dense bytes", "sent bytes", "reason")
    total = [sum(column) for column in zip(*rows.values(), strict=True)] or [0, 0, 0]
    table = [header]
    for (label, shape_text, codec, reason), (count, dense, sent) in rows.items():
        table.append(
            (label + (f" (x{count})" if count > 1 else ""), shape_text, codec, f"{dense:,}", f"{sent:,}", reason)
        )
    table.append(("all", "", "", f"{total[1]:,}", f"{total[2]:,}", f"{total[1] / max(1, total[2]):.1f} times smaller"))
    return _aligned(table)


def _without_numbers(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _aligned(table: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    right = {3, 4}
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )
