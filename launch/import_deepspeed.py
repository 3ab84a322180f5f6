"""`thinwire config import-deepspeed`: DeepSpeed's JSON as YAML for `thinwire train`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from thinwire.launch.complaint import complain
from thinwire.launch.deepspeed_config import Translation, translate

_USER_ERROR = 2
_WIDTH = 110


def main(path: Path, base: Path | None) -> int:
    """Print the translation, or a whole configuration where `base` says the rest; returns the exit code.

    Args:
        base: a YAML file of thinwire, for what DeepSpeed's file does not know: model, data, number of steps.
    """
    from thinwire.dist.config import ConfigError

    try:
        print(render(path, base), end="")
    except (ConfigError, ValueError) as error:
        return complain(error, _USER_ERROR)
    return 0


def render(path: Path, base: Path | None = None) -> str:
    """The translated settings as YAML, with a comment for each key that is not, or not quite, what it was.

    Raises:
        ValueError: the file is missing or no DeepSpeed configuration.
        ConfigError: the base is not a configuration, or not one together with what was translated.
    """
    found = translate(_read(path))
    settings = found.settings if base is None else _complete(found.settings, base)
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=_WIDTH)
    return _comment(path, found, base) + text


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}; give DeepSpeed's JSON file") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f'{path}: expected an object, such as {{"zero_optimization": {{"stage": 3}}}}')
    return config


def _complete(settings: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """The base's settings, replaced by those given, and checked as a whole."""
    from thinwire.dist.config import load_config

    overrides = ["engine={}"]  # whatever the translated method trains with
    for part, value in settings.items():
        if part in ("train", "output"):
            overrides += [f"{part}.{name}={json.dumps(one)}" for name, one in value.items()]
        else:
            overrides.append(f"{part}={json.dumps(value)}")
    return load_config(base, overrides).resolved()


def _comment(path: Path, found: Translation, base: Path | None) -> str:
    lines = [f"Translated from DeepSpeed's {path.name}."]
    if base is None:
        lines.append(
            "Missing, because DeepSpeed does not know them: model, data, train.steps (--base takes them from a run)."
        )
    if found.remarks:
        lines.append("Not as it was:")
    wrapped = [f"# {line}" for line in lines]
    for key, text in found.remarks.items():
        wrapped += textwrap.wrap(
            f"{key} {text}", _WIDTH, initial_indent="#   ", subsequent_indent="#     ", break_on_hyphens=False
        )
    return "\n".join(wrapped) + "\n"
