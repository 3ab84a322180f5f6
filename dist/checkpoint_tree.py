"""Trees of tensors and plain values as JSON plus a flat table of tensors, and back, without loss and without pickle.

Numbers, strings, None, lists and dicts with string keys are written as they are; what JSON cannot say is a one-key
object: {"$tensor": name}, {"$tuple": [...]}, {"$dict": [[key, value], ...]} (keys that are not all strings, or that
start with "$"), {"$float": "nan" | "inf" | "-inf"}. A tensor's name is its path, joined by "/" ("~" and "/" in a key
are "~0" and "~1", as in a JSON pointer). Tensors that are the same view of the same memory (tied weights) are stored
once and come back as one.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_DTYPE_NAMES = (
    "float64 float32 float16 bfloat16 complex128 complex64 complex32 int64 int32 int16 int8 uint64 uint32 uint16 uint8 "
    "bool float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
)
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _DTYPE_NAMES.split() if hasattr(torch, name)}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

DEPTH_LIMIT = 50  # a level takes up to three in JSON, and pydantic's parser stops at 200

_SCALARS = (str, int, float, bool, type(None))


def flatten(tree: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Split a tree into its JSON form and its tensors by name.

    Raises ValueError, naming the path, for anything but dict, OrderedDict (comes back as dict), list, tuple, str,
    int, float, bool, None and dense tensors of the dtypes in DTYPES.
    """
    tensors: dict[str, Tensor] = {}
    name_of_view: dict[tuple[object, ...], str] = {}

    def visit(value: Any, path: str | None) -> Any:
        kind = type(value)
        if path is not None and path.count("/") >= DEPTH_LIMIT:
            raise ValueError(f"checkpoint: {path} is nested deeper than {DEPTH_LIMIT} levels")
        if kind is str and not _is_unicode(value):
            raise ValueError(f"checkpoint: {path} is a str that has no UTF-8 form: {value!a}")
        if isinstance(value, Tensor):
            return {"$tensor": keep(value, path or "")}
        if kind is float and not math.isfinite(value):
            return {"$float": str(value)}
        if kind in _SCALARS:
            return value
        if kind is list:
            return [visit(item, _join(path, index)) for index, item in enumerate(value)]
        if kind is tuple:
            return {"$tuple": [visit(item, _join(path, index)) for index, item in enumerate(value)]}
        if kind in (dict, OrderedDict):
            return visit_dict(value, path)
        raise ValueError(
            f"checkpoint: {path or 'the state'} is a {kind.__module__}.{kind.__qualname__}; a checkpoint holds dict, "
            "list, tuple, str, int, float, bool, None and tensors: convert it in state_dict()"
        )

    def visit_dict(value: Mapping[Any, Any], path: str | None) -> Any:
        items = []
        paths = set()
        for key, item in value.items():
            if type(key) not in _SCALARS:
                raise ValueError(
                    f"checkpoint: {path or 'the state'} has the key {key!r}; a key is a str, int, float, bool or None"
                )
            inner = _join(path, key)
            if inner in paths:
                raise ValueError(f"checkpoint: {path or 'the state'} has two keys that read as {key!s}; rename one")
            paths.add(inner)
            items.append([visit(key, inner), visit(item, inner)])
        if all(type(key) is str and not key.startswith("$") for key in value):
            return dict(items)
        return {"$dict": items}

    def keep(tensor: Tensor, path: str) -> str:
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPE_NAMES:
            raise ValueError(
                f"checkpoint: {path} is a tensor of dtype {tensor.dtype}, layout {tensor.layout} on {tensor.device}; "
                f"a checkpoint holds dense tensors with values, of dtype {', '.join(DTYPES)}"
            )
        if isinstance(tensor, DTensor) or tensor.numel() == 0:
            tensors[path] = tensor
            return path
        flags = (tensor.is_conj(), tensor.is_neg())
        view = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, flags)
        name = name_of_view.setdefault(view, path)
        tensors[name] = tensor
        return name

    return visit(tree, None), tensors


def unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Rebuild what flatten() split. Raises ValueError for a form that flatten() does not write or a missing tensor."""
    if isinstance(tree, list):
        return [unflatten(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    marker = next(iter(tree), "")
    if not marker.startswith("$"):
        return {key: unflatten(item, tensors) for key, item in tree.items()}
    value = tree[marker]
    if len(tree) == 1:
        if marker == "$tensor" and isinstance(value, str) and value in tensors:
            return tensors[value]
        if marker == "$float" and value in ("nan", "inf", "-inf"):
            return float(value)
        if marker == "$tuple" and isinstance(value, list):
            return tuple(unflatten(item, tensors) for item in value)
        if marker == "$dict" and isinstance(value, list) and all(map(_is_item, value)):
            return {unflatten(key, tensors): unflatten(item, tensors) for key, item in value}
    raise ValueError(f"checkpoint: unknown form {marker!r} in the stored tree")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_item(pair: object) -> bool:
    if not (isinstance(pair, list) and len(pair) == 2):
        return False
    key = pair[0]
    return isinstance(key, _SCALARS) or (isinstance(key, dict) and list(key) == ["$float"])


def _join(path: str | None, key: object) -> str:
    step = str(key).replace("~", "~0").replace("/", "~1")
    return step if path is None else f"{path}/{step}"
