"""What is wrong with a configuration, in the words of its reader: path, value, what is allowed, nearest known key."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says why and what to write instead."""


def explain(error: ValidationError, root: type[BaseModel], where: str) -> str:
    """One text for all mistakes, one line each.

    Args:
        root: the model that was validated.
        where: the file.
    """
    lines: dict[str, str] = {}  # a union reports each of its members: one line per path is enough
    for detail in error.errors(include_url=False):
        path, field, owner = _locate(root, detail["loc"], detail["type"])
        lines.setdefault(path, _sentence(detail, path, field, owner, root))
    mistakes = "\n".join(f"  {line}" for line in lines.values())
    return f"{where}: {len(lines)} setting{'s' if len(lines) > 1 else ''} cannot be used:\n{mistakes}"


def _locate(
    root: type[BaseModel], loc: tuple[int | str, ...], kind: str
) -> tuple[str, FieldInfo | None, type[BaseModel]]:
    """Dotted path of a setting, its field, and the model that owns it.

    Pydantic's own location also names which member of a union was tried; that is nothing to the reader.
    """
    path, field, owner = "", None, root
    node: Any = root
    for part in loc:
        variants = _models(node)
        if isinstance(part, int):
            path += f"[{part}]"
            lists = _lists(node)
            node = get_args(lists[0])[0] if lists else None
            field = None
        elif (lists := _lists(node)) and not variants:
            node = lists[0]
        elif len(variants) > 1 and (chosen := _by_tag(variants).get(part)):
            node = owner = chosen
        elif len(variants) == 1 and part in variants[0].model_fields:
            owner = variants[0]
            field = owner.model_fields[part]
            node = field.annotation
            path = f"{path}.{part}" if path else part
        elif kind == "extra_forbidden" and len(variants) == 1:
            return (f"{path}.{part}" if path else part), None, variants[0]
        else:
            break
    return path, field, owner


def _sentence(
    detail: ErrorDetails, path: str, field: FieldInfo | None, owner: type[BaseModel], root: type[BaseModel]
) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{path}: unknown key; {_nearest(path, owner, root)}"
    if kind == "value_error":
        return f"{path}: {context['error']}" if path else str(context["error"])
    if kind.startswith("union_tag"):
        tags = list(_by_tag(_models(field.annotation))) if field else []
        tag = context.get("tag")
        close = difflib.get_close_matches(str(tag), tags, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        given = "missing" if tag is None else f"{tag!r} is not known"
        return f"{path}.kind: {given}; allowed: {', '.join(tags)}{hint}"
    allowed = _describe(field)
    if kind == "missing":
        return f"{path}: missing; give {allowed}"
    if isinstance(value, str) and field is not None:
        choices = [str(choice) for choice in _literals(field.annotation)]
        if close := difflib.get_close_matches(value, choices, n=1):
            allowed += f"; did you mean {close[0]}?"
    return f"{path}: {value!r} cannot be used; give {allowed}"


def _nearest(path: str, owner: type[BaseModel], root: type[BaseModel]) -> str:
    """Which key was probably meant: one beside it, or one of the same name in another part."""
    *parent, leaf = path.split(".")
    known = f"known here: {', '.join(owner.model_fields)}"
    if close := difflib.get_close_matches(leaf, list(owner.model_fields), n=1, cutoff=0.6):
        return f"did you mean {'.'.join([*parent, close[0]])}? ({known})"
    everywhere = list(_paths(root))
    elsewhere = [candidate for candidate in everywhere if candidate.rpartition(".")[2] == leaf]
    elsewhere = elsewhere or difflib.get_close_matches(path, everywhere, n=1)
    return f"did you mean {elsewhere[0]}? ({known})" if elsewhere else known


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in _models(field.annotation):
            yield from _paths(inner, f"{prefix}{name}.")


def _describe(field: FieldInfo | None) -> str:
    """What a setting takes, for people: its types, choices and bounds."""
    return "keys and values" if field is None else _type_name(field.annotation) + _bounds(field.metadata)


def _bounds(constraints: list[Any]) -> str:
    bounds = []
    for constraint in constraints:
        for name, words in (
            ("gt", "above"),
            ("ge", "at least"),
            ("lt", "below"),
            ("le", "at most"),
            ("multiple_of", "a multiple of"),
        ):
            if (bound := getattr(constraint, name, None)) is not None:
                bounds.append(f"{words} {bound}")
        if pattern := getattr(constraint, "pattern", None):
            bounds.append(f"that matches {pattern}")
    return f" {' and '.join(bounds)}" if bounds else ""


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Annotated and isinstance(get_args(annotation)[1], FieldInfo):
        inner, info = get_args(annotation)[:2]
        return _type_name(inner) + _bounds(info.metadata)
    annotation = _bare(annotation)
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text (quote it if need be)",
        type(None): "null",
    }
    if annotation in names:
        return names[annotation]
    if get_origin(annotation) is Literal:
        return " or ".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        if models := _models(annotation):
            kinds = " or ".join(_by_tag(models))
            return f"keys and values with kind: {kinds}" if kinds else _type_name(models[0])
        return " or ".join(_type_name(member) for member in get_args(annotation))
    if get_origin(annotation) in (tuple, list):
        return f"a list, each item {_type_name(get_args(annotation)[0])}"
    if models := _models(annotation):
        return f"keys and values ({', '.join(models[0].model_fields)})"
    return str(getattr(annotation, "__name__", annotation))


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The settings models that an annotation holds: itself, or the members of a union."""
    annotation = _bare(annotation)
    if isinstance(annotation, type) and not get_args(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType):
        return [model for member in get_args(annotation) for model in _models(member)]
    return []


def _lists(annotation: Any) -> list[Any]:
    """The list types that an annotation holds: itself, or the members of a union."""
    annotation = _bare(annotation)
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return [member for member in members if get_origin(member) in (tuple, list)]


def _by_tag(models: list[type[BaseModel]]) -> dict[str, type[BaseModel]]:
    return {str(m.model_fields["kind"].default): m for m in models if "kind" in m.model_fields}


def _literals(annotation: Any) -> list[Any]:
    annotation = _bare(annotation)
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for member in get_args(annotation) for choice in _literals(member)]
