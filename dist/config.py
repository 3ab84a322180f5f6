"""The configuration of a run: one YAML file plus `key.path=value` overrides, checked as a whole."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from thinwire.comm.settings import Settings
from thinwire.dist.balance_run import BalanceRunSettings, check_balance
from thinwire.dist.checkpoint import CheckpointSettings
from thinwire.dist.config_errors import ConfigError, explain
from thinwire.dist.data import DataSettings
from thinwire.dist.engine import DDPSettings, EngineSettings
from thinwire.dist.mesh import MeshSettings
from thinwire.dist.methods import MethodSettings, engines_for, methods_for, unused_by
from thinwire.dist.models import ModelSettings
from thinwire.dist.optimizers import AdamWSettings, OptimizerSettings, ScheduleSettings
from thinwire.dist.run_folder import OutputSettings
from thinwire.dist.train import TrainSettings
from thinwire.dist.world import WorldSettings

__all__ = ["ConfigError", "RunConfig", "dump_config", "load_config"]


class RunConfig(Settings):
    """All that defines a run. Each part's settings are documented where the class that they configure is.

    name: of the run, by default that of its file; its folder is output.folder/name.
    seed: of the initial weights and of the order of the samples.
    balance: the load-balancing loss of a model with routers; null = none.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0, lt=1 << 63)
    model: ModelSettings
    data: DataSettings = DataSettings()
    optimizer: OptimizerSettings = AdamWSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    train: TrainSettings
    method: MethodSettings
    balance: BalanceRunSettings | None = None
    engine: EngineSettings = DDPSettings()
    world: WorldSettings = WorldSettings()
    mesh: MeshSettings = MeshSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    output: OutputSettings = OutputSettings()

    @model_validator(mode="after")
    def _ends_with_a_round(self) -> RunConfig:
        steps, every = self.train.steps, getattr(self.method, "every", 1)
        if steps % every:
            below = steps // every * every
            legal = " or ".join(str(n) for n in (below, below + every) if n)
            raise ValueError(
                f"train.steps: {steps} is not a multiple of method.every {every}, so what the ranks learn in the last "
                f"{steps - below} steps would be thrown away; nearest: {legal}"
            )
        return self

    @model_validator(mode="after")
    def _traced_steps_come(self) -> RunConfig:
        traced, steps = self.output.trace_steps, self.train.steps
        if traced is not None and traced[1] > steps:
            raise ValueError(
                f"output.trace_steps: [{traced[0]}, {traced[1]}], but the run ends after train.steps: {steps}; give "
                "steps of the run"
            )
        return self

    @model_validator(mode="after")
    def _balance_has_something_to_do(self) -> RunConfig:
        check_balance(self)
        return self

    @model_validator(mode="after")
    def _nothing_goes_unused(self) -> RunConfig:
        for path, why in unused_by(self.method).items():
            *parents, leaf = path.split(".")
            owner: Settings = self
            for name in parents:
                owner = getattr(owner, name)
            if leaf in owner.model_fields_set:
                raise ValueError(f"{path}: is given, but method {self.method.kind} {why}; remove it")
        return self

    @model_validator(mode="after")
    def _engine_knows_method(self) -> RunConfig:
        engine, method = self.engine.kind, self.method.kind
        allowed = engines_for(method)
        if engine not in allowed:
            others = (
                "another method"
                if engine == "ddp"
                else " or ".join(f"method: {{kind: {m}}}" for m in methods_for(engine))
            )
            raise ValueError(
                f"engine.kind: {engine} does not train by method {method}, whose engine is {' or '.join(allowed)}; "
                f"give engine: {{kind: {allowed[0]}}}, or {others}"
            )
        level = getattr(self.method, "exact_within", None)
        if engine == "deepspeed" and level is not None:
            raise ValueError(
                f"method.exact_within: {level} with engine deepspeed, which reduces by "
                "engine.gradients; give method.exact_within=null, or engine: {kind: ddp}"
            )
        return self

    @model_validator(mode="after")
    def _experts_are_spread_where_that_works(self) -> RunConfig:
        level = getattr(self.model, "expert_parallel", None)
        if level is not None and (self.method.kind, self.engine.kind) != ("allreduce", "ddp"):
            raise ValueError(
                f"model.expert_parallel: {level} works with method: {{kind: allreduce}} and engine: {{kind: ddp}}, not "
                f"with {self.method.kind} and {self.engine.kind}; give these, or model.expert_parallel=null"
            )
        return self

    @model_validator(mode="after")
    def _bf16_weights_compute_in_bf16(self) -> RunConfig:
        if getattr(self.method, "weights", None) == "bf16" and self.train.precision != "bf16":
            raise ValueError(
                f"method.weights: bf16 is what the model would compute in, but train.precision is "
                f"{self.train.precision}; give train.precision=bf16, or method.weights=fp32"
            )
        return self

    def resolved(self) -> dict[str, Any]:
        """All settings that this run uses, as JSON values."""
        settings = self.model_dump(mode="json")
        if self.balance is None:  # a run without it is what it was before there was one
            del settings["balance"]
        for path in unused_by(self.method):
            *parents, leaf = path.split(".")
            node = settings
            for name in parents:
                node = node[name]
            del node[leaf]
        return settings

    @property
    def folder(self) -> Path:
        """Where the run writes: metrics, resolved configuration, checkpoints."""
        return Path(self.output.folder).expanduser() / self.name


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, replace the settings that the overrides name, and check everything.

    Args:
        overrides: texts such as "train.steps=100"; what follows the = is YAML.
    Raises:
        ConfigError: one text with every mistake: path of the setting, value, what is allowed, nearest known key.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; give a YAML file, such as one of configs/*.yaml")
    data = _parse(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys and values, such as `train: {{steps: 100}}`; found {data!r}")
    for override in overrides:
        _apply(data, override)
    data.setdefault("name", path.stem)
    _name_engine(data)
    try:
        # By way of JSON: there pydantic's strict mode takes a list for a tuple, but still tells 1 from "1".
        return RunConfig.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig, str(path))) from None


def _name_engine(data: dict[str, Any]) -> None:
    """An engine that is given without its kind, or not at all, is the one that the method trains with."""
    method, engine = data.get("method"), data.get("engine", {})
    if isinstance(method, dict) and isinstance(engine, dict):
        kind = engines_for(str(method.get("kind")))[0]
        if "engine" in data or kind != DDPSettings().kind:  # an engine that is given must have a use
            data["engine"] = {"kind": kind, **engine}


def dump_config(config: RunConfig) -> str:
    """The fully resolved configuration as YAML, which loads back to an equal one."""
    return yaml.safe_dump(config.resolved(), sort_keys=False, allow_unicode=True, width=110)


class _Loader(yaml.SafeLoader):
    """YAML with the floats that people write (1e-4 is a string in YAML 1.1), and no key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                line = node.value[position][0].start_mark.line + 1
                raise yaml.constructor.ConstructorError(None, None, f"line {line}: the key {key!r} is given twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None


def _apply(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"{override!r}: an override has the form key.path=value, such as train.steps=100")
    node = data
    for depth, key in enumerate(keys[:-1]):
        inner = node.setdefault(key, {})
        if not isinstance(inner, dict):
            above = ".".join(keys[: depth + 1])
            raise ConfigError(f"{override!r}: {above} is {inner!r}, which has no keys; give {above}=... as a whole")
        node = inner
    node[keys[-1]] = _parse(text, repr(override))
