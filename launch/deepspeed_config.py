"""A DeepSpeed configuration in thinwire's words: what has a counterpart, and what has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from thinwire.launch.deepspeed_keys import NO_COUNTERPART

_PRESETS = {1: "zero1", 2: "zero2", 3: "zero3"}
_ADAM = ("adam", "adamw", "fusedadam", "deepspeedcpuadam", "torch_adam")
_DTYPES = {"fp16": "fp16", "bfp16": "bf16", "bf16": "bf16", "fp32": "fp32"}
_SWITCHES = {"enabled", "device"}
_NOTHING: tuple[Any, ...] = (None, False, "auto", "none", {}, [])


@dataclass
class Translation:
    """settings: the part of a run's YAML that DeepSpeed's file speaks of. remarks: what must be known, by its key."""

    settings: dict[str, Any] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)

    def put(self, path: str, value: Any) -> None:
        *parents, leaf = path.split(".")
        node = self.settings
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value


class _Keys:
    """DeepSpeed's keys by path; each is taken once, so that what nobody has taken can be named."""

    def __init__(self, config: Mapping[str, Any], into: Translation) -> None:
        self._left = dict(_leaves(config))
        self._into = into

    def take(self, path: str, default: Any = None) -> Any:
        """The value, or a section as a whole; the default where it is missing or left to Hugging Face."""
        value = self._left.pop(path, None)
        if value is None:
            names = [name for name in self._left if name.startswith(f"{path}.")]
            section = {name.removeprefix(f"{path}."): self.take(name) for name in names}
            value = {name: one for name, one in section.items() if one is not None} or None
        if value == "auto":
            self._into.remarks[path] = "is auto: Hugging Face's trainer would fill it in; give the setting yourself"
            return default
        return default if value is None else value

    def remaining(self) -> dict[str, Any]:
        return self._left


def translate(config: Mapping[str, Any]) -> Translation:
    """What a DeepSpeed configuration asks for, as settings of a run.

    Args:
        config: of DeepSpeed 0.3 to 0.19: ZeRO stages, hpZ, MiCS, ZeRO++, LoCo, optimizer, schedule, precision.
    Raises:
        ValueError: a value that DeepSpeed itself would not take.
    """
    found = Translation()
    keys = _Keys(config, found)
    _batch(keys, found)
    _optimizer(keys, found)
    _schedule(keys, found)
    _precision(keys, found)
    _zero(keys, found)
    _around(keys, found)
    for path, value in keys.remaining().items():
        section = next((name for name in NO_COUNTERPART if path == name or path.startswith(f"{name}.")), None)
        if section is None:
            found.remarks[path] = f"= {value!r} is no key of DeepSpeed that thinwire knows, and was left out"
        elif not _is_nothing(config, section):
            found.remarks[section] = NO_COUNTERPART[section]
    return found


def _batch(keys: _Keys, found: Translation) -> None:
    whole, micro = keys.take("train_batch_size"), keys.take("train_micro_batch_size_per_gpu")
    steps = keys.take("gradient_accumulation_steps")
    if whole is not None:
        found.put("train.global_batch", whole)
    elif micro is not None:
        found.remarks["train_batch_size"] = (
            f"is missing: give train.global_batch = {micro * (steps or 1)} x the number of ranks"
        )
    if micro is not None:
        found.put("train.micro_batch", micro)
    elif steps is not None:
        found.remarks["gradient_accumulation_steps"] = (
            f"= {steps}: give train.micro_batch = train.global_batch / ranks / {steps}"
        )
    found.put("train.clip_norm", float(keys.take("gradient_clipping", 0.0)))  # DeepSpeed's default; thinwire's is 1


def _optimizer(keys: _Keys, found: Translation) -> None:
    kind, params = keys.take("optimizer.type"), keys.take("optimizer.params", {})
    keys.take("optimizer.legacy_fusion")
    if kind is None:
        found.remarks["optimizer"] = "is missing: the script's own is not known here; AdamW is thinwire's default"
        return
    given = dict(params)
    if str(kind).lower() in _ADAM:
        options = {"lr": given.pop("lr", 1e-3), "eps": given.pop("eps", 1e-8)}
        betas = [given.pop(f"betas.{i}", default) for i, default in enumerate((0.9, 0.999))]
        options |= {"beta1": betas[0], "beta2": betas[1], "weight_decay": given.pop("weight_decay", 0.0)}
        found.put("optimizer", {"kind": "adamw", **options})
        adam_w = given.pop("adam_w_mode", str(kind).lower() != "torch_adam")
        if not adam_w and options["weight_decay"]:
            found.remarks["optimizer.params.adam_w_mode"] = "is false, but thinwire's weight decay is always decoupled"
        for unused in ("torch_adam", "bias_correction", "amsgrad", "fused"):
            if unused == "amsgrad" and given.get(unused):
                continue
            given.pop(unused, None)
    elif str(kind).lower() == "sgd":
        options = {"lr": given.pop("lr", 1e-3), "momentum": given.pop("momentum", 0.0)}
        options |= {"nesterov": given.pop("nesterov", False), "weight_decay": given.pop("weight_decay", 0.0)}
        found.put("optimizer", {"kind": "sgd", **options})
        if options["weight_decay"]:
            found.remarks["optimizer.params.weight_decay"] = "does not go through the momentum here: it is decoupled"
    else:
        found.remarks["optimizer.type"] = f"= {kind!r} {_other_optimizer(str(kind).lower())}"
        return
    if options["weight_decay"]:
        found.remarks["optimizer.params.weight_decay"] = (
            found.remarks.get("optimizer.params.weight_decay", "")
            + " thinwire decays matrices only, neither biases nor norms"
        ).strip()
    for name in given:
        found.remarks[f"optimizer.params.{name}"] = "has no counterpart"


def _other_optimizer(kind: str) -> str:
    if kind in ("onebitadam", "onebitlamb", "zerooneadam"):
        return (
            "was removed from DeepSpeed in 0.19.7 and is none of thinwire's; nearest: optimizer adamw with "
            "method: {kind: compress, compressor: {kind: sign}, feedback: {kind: ef}}"
        )
    return "has no counterpart: thinwire has adamw and sgd"


def _schedule(keys: _Keys, found: Translation) -> None:
    kind, params = keys.take("scheduler.type"), keys.take("scheduler.params", {})
    given = dict(params)
    if kind is None:
        found.put("schedule", {"kind": "constant"})
        return
    if kind not in ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR"):
        found.remarks["scheduler.type"] = (
            f"= {kind!r} has no counterpart: thinwire has constant and cosine, with warmup"
        )
        return
    warmup = given.pop("warmup_num_steps", 1000)
    cosine = {"kind": "cosine", "warmup_steps": warmup}
    if "total_num_steps" in given:
        cosine["decay_steps"] = given.pop("total_num_steps")
    if kind == "WarmupLR":
        found.put("schedule", {"kind": "constant", "warmup_steps": warmup})
    elif kind == "WarmupCosineLR":
        found.put("schedule", {**cosine, "final": given.pop("cos_min_ratio", 1e-4)})
    else:
        found.put("schedule", {**cosine, "final": 0.0})
        found.remarks["scheduler.type"] = (
            "= 'WarmupDecayLR' falls linearly; thinwire's cosine ends at 0 in the same step"
        )
    if given.pop("warmup_type", "log") == "log":
        found.remarks["scheduler.params.warmup_type"] = "is log (DeepSpeed's default); thinwire's warmup is linear"
    for name in ("warmup_min_lr", "warmup_min_ratio"):
        if given.pop(name, 0):
            found.remarks[f"scheduler.params.{name}"] = "has no counterpart: warmup begins at lr / warmup_steps"
    if (peak := given.pop("warmup_max_lr", None)) is not None:
        found.put("optimizer.lr", peak)
        found.settings["optimizer"].setdefault("kind", "adamw")
    for name in given:
        found.remarks[f"scheduler.params.{name}"] = "has no counterpart"


def _precision(keys: _Keys, found: Translation) -> None:
    brain, half, cast = (keys.take(name, {}) for name in ("bf16", "fp16", "torch_autocast"))
    brain = brain or keys.take("bfloat16", {})
    if brain.get("enabled") is True or (cast.get("enabled") is True and "16" in str(cast.get("dtype", "bfloat16"))):
        found.put("train.precision", "bf16")
    elif half.get("enabled") is True:
        found.put("train.precision", "bf16")
        found.remarks["fp16"] = "became train.precision: bf16, which needs no loss scale; fp16 has no counterpart"
    elif "auto" in (brain.get("enabled"), half.get("enabled")):
        found.remarks["bf16.enabled"] = (
            "is auto: Hugging Face's trainer would fill it in; give train.precision yourself"
        )
    else:
        found.put("train.precision", "fp32")
    for name in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
        if brain.get(name):
            found.remarks[f"bf16.{name}"] = "has no counterpart: masters and optimizer states are always fp32"


def _zero(keys: _Keys, found: Translation) -> None:
    stage = keys.take("zero_optimization.stage", 0)
    if stage not in (0, *_PRESETS):
        raise ValueError(f"zero_optimization.stage: {stage!r} is none of 0, 1, 2, 3")
    secondary = keys.take("zero_optimization.zero_hpz_partition_size", 1)
    shard = keys.take("zero_optimization.mics_shard_size", -1)
    weights = keys.take("zero_optimization.zero_quantized_weights", False)
    gradients = keys.take("zero_optimization.zero_quantized_gradients", False)
    dtype = keys.take("communication_data_type")
    if stage == 0:
        found.put("method", {"kind": "allreduce", **({"dtype": _dtype(dtype)} if dtype else {})})
    else:
        found.put("method", {"kind": "partition", "preset": _PRESETS[stage]})
    if stage == 3:
        found.remarks["zero_optimization.stage"] = (
            "= 3 sends over the slow links in every micro-batch; params: node, grads: node, optim: world sends once "
            "per step, for more memory"
        )
        if secondary > 1:
            found.put("method.preset", "hpz")
            _node(found, secondary, "zero_optimization.zero_hpz_partition_size")
        if shard > 0:
            found.put("method.preset", "mics")
            _node(found, shard, "zero_optimization.mics_shard_size")
            del found.remarks["zero_optimization.stage"]
        if weights:
            found.put("method.gather", "int8")
    else:
        for name, on in (("hpz_partition_size", secondary > 1), ("quantized_weights", weights)):
            if on:
                found.remarks[f"zero_optimization.zero_{name}"] = (
                    f"means nothing in stage {stage}: DeepSpeed has it in 3"
                )
    prefetch = keys.take("zero_optimization.stage3_prefetch_bucket_size")
    if stage and prefetch == 0:
        found.put("engine", {"kind": "fsdp2", "prefetch": 0})
    if gradients and stage == 3:
        # Two hops of int4, as qgZ: on the fast level, and on the slow one.
        found.put("method.gradients", {"node": {"kind": "int4", "smooth": False}, "world": {"kind": "int4"}})
        found.remarks["zero_optimization.zero_quantized_gradients"] = (
            "became int4 on both levels; int8 on node costs little there and loses less"
        )
    elif gradients:
        found.remarks["zero_optimization.zero_quantized_gradients"] = (
            f"means nothing in stage {stage}: DeepSpeed has it in 3; method.gradients would do it here"
        )
    elif stage and dtype and _dtype(dtype) != "fp32":
        found.put("method.gradients", {"node": _dtype(dtype), "world": _dtype(dtype)})


def _node(found: Translation, size: int, key: str) -> None:
    found.put("mesh.levels", [{"name": "node", "size": size}])
    found.remarks[key] = (
        f"= {size} became a level of that size, called node; remove mesh.levels if that is a host's ranks"
    )


def _dtype(given: str) -> str:
    if str(given).lower() not in _DTYPES:
        raise ValueError(f"communication_data_type: {given!r} is none of {', '.join(_DTYPES)}")
    return _DTYPES[str(given).lower()]


def _around(keys: _Keys, found: Translation) -> None:
    if keys.take("activation_checkpointing"):
        found.remarks["activation_checkpointing"] = (
            "only says how, in DeepSpeed: where the script uses it, give "
            "engine: {kind: fsdp2, activation_checkpointing: true}"
        )
    if keys.take("compile", {}).get("deepcompile"):
        found.remarks["compile.deepcompile"] = "has no counterpart; nearest: engine: {kind: fsdp2, compile: inductor}"
    for name in ("tensorboard", "wandb"):
        if keys.take(name, {}).get("enabled") is True:
            found.put(f"output.{name}", True)


def _is_nothing(config: Mapping[str, Any], path: str) -> bool:
    value: Any = config
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value in _NOTHING or (
        isinstance(value, Mapping) and any(value.get(k) in _NOTHING for k in _SWITCHES & value.keys())
    )


def _leaves(config: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in config.items():
        path = f"{above}{name}"
        if isinstance(value, Mapping):
            found += _leaves(value, f"{path}.")
        elif isinstance(value, list):
            found += [(f"{path}.{i}", one) for i, one in enumerate(value)]
        else:
            found.append((path, value))
    return found
