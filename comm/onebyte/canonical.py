"""The canonical tensors of a run: which, in which order, on which grids."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from thinwire.comm.onebyte.lattice import grid_exponent
from thinwire.comm.onebyte.manifest import Manifest, TensorEntry
from thinwire.comm.onebyte.settings import OneByteSettings, nearest_log2
from thinwire.comm.onebyte.stream import LARGEST_ELEMENT, MAX_TENSORS

_DTYPES: dict[torch.dtype, Literal["float32", "bfloat16", "float16"]] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
_OPTIONS: dict[str, tuple[Callable[[float], bool], str]] = {
    "lr": (lambda lr: 0 < lr < math.inf, "more than 0"),
    "eps": (lambda eps: 0 < eps < 1, "between 0 and 1"),
    "weight_decay": (lambda decay: 0 <= decay < math.inf, "0 or more"),
}


def check_groups(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise a ValueError if an optimizer's param_groups have no names, or options that mean nothing here."""
    for group in groups:
        if "param_names" not in group:
            raise ValueError("OneByteSPSA: parameters without names; give model.named_parameters()")
        if unknown := sorted(set(group) - {"params", "param_names", *_OPTIONS}):
            raise ValueError(
                f"OneByteSPSA: a parameter group has {', '.join(unknown)}; of its own it may have {', '.join(_OPTIONS)}"
            )
        for option, (fits, allowed) in _OPTIONS.items():
            if not fits(float(group[option])):
                raise ValueError(f"OneByteSPSA: a parameter group has {option} {group[option]}; it must be {allowed}")


def canonical(groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, Tensor, Mapping[str, Any]]]:
    """(name, parameter, its group) of each trained tensor, in order, tied weights once.

    Args:
        groups: an optimizer's param_groups, with names.
    Raises:
        ValueError: a tensor that cannot be trained so, or none.
    """
    found: list[tuple[str, Tensor, Mapping[str, Any]]] = []
    seen: set[tuple[int, int]] = set()
    for group in groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if not parameter.requires_grad:
                continue  # frozen, as for every optimizer
            _check(name, parameter)
            storage = (parameter.data_ptr(), parameter.numel())
            if parameter.numel() and storage not in seen:
                seen.add(storage)
                found.append((name, parameter, group))
    if not found:
        raise ValueError("OneByteSPSA: no parameter has requires_grad; give those that shall be trained")
    assert len(found) <= MAX_TENSORS
    _check_overlaps(found)
    return found


def describe_run(
    tensors: Sequence[tuple[str, Tensor, Mapping[str, Any]]], settings: OneByteSettings, rate: float | None = None
) -> Manifest:
    """The manifest of a run that begins at these weights.

    Args:
        rate: learning rate of the optimizer's first group, which each round tells; default: settings.lr.
    """
    rate = settings.lr if rate is None else rate
    entries = tuple(
        TensorEntry(
            name=name,
            shape=tuple(parameter.shape),
            dtype=_DTYPES[parameter.dtype],
            exponent=_exponent(name, parameter, _eps_log2(group["eps"], settings), settings),
            eps_log2=_eps_log2(group["eps"], settings),
            rate_scale=float(group["lr"]) / rate,
            decay=group["weight_decay"] if parameter.dim() > 1 else 0.0,
            crc32=zlib.crc32(_bytes_of(parameter)),
        )
        for name, parameter, group in tensors
    )
    for entry in entries:
        if entry.exponent + entry.eps_log2 < 0:
            raise ValueError(
                f"OneByteSPSA: eps 2^{entry.eps_log2} is finer than the grid of {entry.name}, 2^-{entry.exponent}, "
                "whose weights are that large; give its group a larger eps"
            )
    return Manifest(
        seed=settings.seed,
        base_hash=base_hash((name, parameter) for name, parameter, _ in tensors),
        numerics=settings.numerics(),
        tensors=entries,
    )


def base_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of tensors with their names, shapes and dtypes, hex."""
    whole = hashlib.sha256()
    for name, tensor in tensors:
        whole.update(f"{name} {_DTYPES[tensor.dtype]} {list(tensor.shape)};".encode())
        whole.update(_bytes_of(tensor))
    return whole.hexdigest()


def check_base(manifest: Manifest, base: Mapping[str, Tensor]) -> None:
    """Raise a ValueError that names a tensor, if `base` does not have the weights at which the run began."""
    for entry in manifest.tensors:
        tensor = base.get(entry.name)
        if tensor is None:
            raise ValueError(f"the base lacks {entry.name}, which the run trains; it has {_some(base)}")
        dtype = _DTYPES.get(tensor.dtype, tensor.dtype)
        if (dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
            raise ValueError(
                f"the base has {entry.name} as {dtype}{list(tensor.shape)}, the run's is "
                f"{entry.dtype}{list(entry.shape)}"
            )
    found = base_hash((entry.name, base[entry.name]) for entry in manifest.tensors)
    if found != manifest.base_hash:
        odd = [e.name for e in manifest.tensors if e.crc32 not in (None, zlib.crc32(_bytes_of(base[e.name])))]
        first = f": {odd[0]} is the first of {len(odd)} tensors that differ" if odd else ""
        raise ValueError(
            f"the base has the SHA-256 {found[:16]}..., the run began at weights with "
            f"{manifest.base_hash[:16]}...{first}; give the model at which the run began, not one that it has trained"
        )


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _some(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "") or "nothing"


def _exponent(name: str, parameter: Tensor, eps_log2: int, settings: OneByteSettings) -> int:
    try:
        return grid_exponent(parameter, LARGEST_ELEMENT[settings.distribution] * 2.0**eps_log2)
    except ValueError as error:
        raise ValueError(f"OneByteSPSA: {name}: {error}") from None


def _eps_log2(eps: float, settings: OneByteSettings) -> int:
    return settings.numerics().eps_log2 + nearest_log2(eps) - nearest_log2(settings.eps)


def _check_overlaps(tensors: Sequence[tuple[str, Tensor, Mapping[str, Any]]]) -> None:
    """Tied weights are one tensor; weights that share a part of their memory would be perturbed twice there."""
    spans = sorted((p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), name) for name, p, _ in tensors)
    for (_, end, name), (start, _, other) in pairwise(spans):
        if start < end:
            raise ValueError(
                f"OneByteSPSA: {name} and {other} share a part of their memory; give the tensor of which they are "
                "parts, or clone one of them"
            )


def _check(name: str, parameter: Tensor) -> None:
    if isinstance(parameter, DTensor):
        raise ValueError(f"OneByteSPSA: {name} is sharded (a DTensor); every machine holds the whole model here")
    if parameter.is_meta:
        raise ValueError(f"OneByteSPSA: {name} is on the meta device, without values; load the base weights first")
    if parameter.is_inference():
        raise ValueError(f"OneByteSPSA: {name} was made in inference mode; make the model outside of it")
    if parameter.dtype not in _DTYPES:
        raise ValueError(f"OneByteSPSA: {name} has dtype {parameter.dtype}; it must be float32, bfloat16 or float16")
    if not parameter.is_contiguous():
        raise ValueError(f"OneByteSPSA: {name} is not contiguous; make it so with .contiguous()")
