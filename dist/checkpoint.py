"""Checkpoints of a whole job: atomic, verified, agreed on by all ranks, with or without a shared disk."""

from __future__ import annotations

import dataclasses
import json
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from thinwire.comm.settings import Settings
from thinwire.dist import checkpoint_generation as generation_files
from thinwire.dist.checkpoint_agreement import Agreement, CheckpointError, CheckpointMismatchError
from thinwire.dist.checkpoint_disks import find_disks
from thinwire.dist.checkpoint_generation import Generation
from thinwire.dist.checkpoint_plan import (
    TreeSavePlanner,
    load_state,
    plan_from_json,
    plan_to_json,
    results_from_json,
    results_to_json,
    save_state,
)
from thinwire.dist.checkpoint_storage import RawReader, RawWriter

__all__ = ["CheckpointError", "CheckpointMismatchError", "CheckpointSettings", "Checkpointer", "Loaded"]

_log = logging.getLogger(__name__)
_METADATA = "metadata.json"


class CheckpointSettings(Settings):
    """When to write checkpoints and what to start from.

    every_steps: optimizer steps between checkpoints; 0 writes only at the end and on SIGTERM or SIGUSR1.
    keep: generations that stay in the folder, so that a damaged newest one has a predecessor.
    resume: "auto" continues from the run folder's newest checkpoint if there is one; "never" demands a folder
    without any; anything else is the path of another run's checkpoint folder, or of one generation in it, to start
    from.
    """

    every_steps: int = Field(default=0, ge=0)
    keep: int = Field(default=2, ge=2)
    resume: Literal["auto", "never"] | str = "auto"


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory: fresh CPU tensors, or DTensors where the template had them.

    per_rank: this rank's own tree; None when it was written by another number of ranks, and then per_rank_of_all
    holds the trees of all old ranks by old rank. refused: the newer generations that were passed over, each with the
    reason.
    """

    step: int
    path: Path
    shared: dict[str, Any]
    per_rank: dict[str, Any] | None
    facts: dict[str, Any]
    world_size: int
    refused: tuple[str, ...] = ()
    per_rank_of_all: dict[int, dict[str, Any]] = field(default_factory=dict)


class Checkpointer:
    """The checkpoints of one run in one folder; one object per rank, all calls collective over `group`.

    A state is a tree: dicts, lists and tuples of tensors and plain values (checkpoint_tree.py). `shared` is equal on
    every rank (or made of DTensors), such as model.state_dict() and the optimizer's; `per_rank` is this rank's own,
    such as random states and what a method keeps for itself. Any optimizer state_dict will do; keyed by parameter
    name (torch.distributed.checkpoint.state_dict.get_optimizer_state_dict) it also survives another order of
    parameters.

    Ranks find out who shares a disk with whom. On every disk the shared state is written once, by all its ranks
    together, and each rank adds its own; so each machine can restart its ranks alone. The folder belongs to this run.

    Arguments: folder (created; each rank's own path), settings, group (control group; None for a world of one), rank,
    world_size, read_only (load another run's checkpoints: nothing is created or removed, save() is refused).
    Raises CheckpointError on every rank if one cannot write there, or if settings.resume is "never" and there are
    any.
    """

    def __init__(
        self,
        folder: Path,
        settings: CheckpointSettings,
        *,
        group: torch.distributed.ProcessGroup | None,
        rank: int,
        world_size: int,
        read_only: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.settings = settings
        self.read_only = read_only
        self._agreement = Agreement(group, rank, world_size)
        self._rank = rank
        self._world_size = world_size
        self._ours: set[str] = set()  # names of generations that this run's history goes through
        self._abandoned: set[str] = set()  # names of those that load_latest passed over
        self.disks: list[list[int]] = []
        if not read_only:
            self.disks = find_disks(self.folder, self._agreement)
            self._agreement.run("look at the folder", self._refuse_old_run)
        self._disk = next((ranks for ranks in self.disks if rank in ranks), [rank])
        self._is_leader = self._disk[0] == rank

    def save(
        self,
        step: int,
        shared: Mapping[str, Any],
        per_rank: Mapping[str, Any],
        facts: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a generation and remove those beyond settings.keep. Collective; returns its directory.

        facts: JSON values for the manifest (hash of the config, versions, ...); the lowest rank's are written on
        each disk. Raises CheckpointError on every rank, naming the rank and the reason, if one fails: disk full, no
        permission, an unsupported value. The older generations are then still there.
        """
        if self.read_only:
            raise CheckpointError(f"checkpoint: {self.folder} was opened read-only")
        planner = TreeSavePlanner()

        facts = dict(facts or {})

        def plan() -> Any:
            self._refuse_strangers()
            _refuse_lossy_facts(facts)
            planner.set_up_planner(dict(shared), None, True)
            # Whoever writes alone needs nobody's plan, and nobody needs his: no bytes for slow links.
            rows = plan_to_json(planner.create_local_plan()) if len(self._disk) > 1 else []
            if self._is_leader:
                generation_files.remove_leftovers(self.folder)
            values = json.dumps(planner.tree, sort_keys=True).encode()
            return {"plan": rows, "values": sha256(values).hexdigest(), "id": secrets.token_hex(16)}

        planned = self._agreement.run(f"save of step {step}", plan)
        different = [rank for rank, p in enumerate(planned) if p["values"] != planned[0]["values"]]
        if different:
            raise CheckpointError(
                f"checkpoint: save of step {step}: the names or plain values in `shared` on ranks {different} differ "
                "from those on rank 0; what belongs to one rank goes into per_rank"
            )
        save_id = planned[0]["id"]
        written = self.folder / f".writing-{save_id}"
        target = self.folder / f"step-{step:08d}"

        def commit() -> None:
            if self._is_leader:
                generation_files.commit(written, target, save_id)

        try:
            self._write(step, written, planner=planner, planned=planned, per_rank=per_rank, facts=facts)
            self._agreement.run(f"save of step {step}", commit)
        except CheckpointError as error:
            if self._is_leader:
                self._try_to(generation_files.remove_leftovers, self.folder)
            # Where disks are separate, some may have got as far as the last rename.
            self._abandoned |= set(generation_files.names(self.folder)) - self._ours
            raise type(error)(f"{error}. The older checkpoints in {self.folder} are intact") from error
        self._ours.add(target.name)
        self._abandoned.discard(target.name)
        if self._is_leader:
            self._try_to(self._prune, target)
        self._agreement.run("removal of old generations", lambda: None)
        self._abandoned.clear()
        return target

    def load_latest(
        self,
        shared: Mapping[str, Any] | None = None,
        *,
        world_size_changed: Literal["refuse", "all_ranks"] = "refuse",
    ) -> Loaded | None:
        """Load the newest generation that every rank finds sound, or return None if no rank has any. Collective.

        shared: a template, never written to: its DTensors say how to shard, its tensors are compared in shape and
        dtype. Damaged generations are passed over, logged and named in Loaded.refused. After another number of ranks
        wrote it, "refuse" raises; "all_ranks" leaves per_rank None and gives every old rank's tree, whose meaning
        only a method knows.

        Raises CheckpointError if there are generations but none that all ranks can read (a run never starts afresh by
        accident), CheckpointMismatchError if a sound one belongs to another model or world size.
        """
        mine: list[Generation] = []

        def list_mine() -> Any:
            mine.extend(generation_files.generations(self.folder))
            return {
                "has": [[g.step, g.manifest.save_id, g.is_plain] for g in mine if g.manifest is not None],
                "refused": [f"{g.path.name}: {g.refusal}" for g in mine if g.manifest is None],
            }

        told = self._agreement.run("listing of generations", list_mine)
        by_id = {(g.step, g.manifest.save_id): g for g in mine if g.manifest is not None}
        refused = sorted({text for t in told for text in t["refused"]})
        if not any(t["has"] for t in told) and not refused:
            if self.read_only:
                raise CheckpointError(f"checkpoint: {self.folder} holds no checkpoint; correct checkpoint.resume")
            return None
        votes: dict[tuple[int, str], list[bool]] = {}
        for t in told:
            for step, save_id, is_plain in t["has"]:
                votes.setdefault((step, save_id), []).append(is_plain)
        # Newest first; of two writings of the same step, the one that more ranks have under the step's own name.
        for key in sorted(votes, key=lambda k: (k[0], sum(votes[k]), k[1]), reverse=True):
            step, save_id = key
            missing = [r for r, t in enumerate(told) if key not in {(s, i) for s, i, _ in t["has"]}]
            if missing:
                refused.append(f"step-{step:08d}: ranks {missing} do not have it")
                continue
            loaded, reasons = self._try_to_load(by_id[key], shared or {}, world_size_changed)
            if loaded is not None:
                self._take_up(loaded, mine)
                for text in refused:
                    _log.warning("checkpoint: passed over %s", text)
                return dataclasses.replace(loaded, refused=tuple(refused))
            refused += reasons
        raise CheckpointError(
            f"checkpoint: no generation in {self.folder} can be read by every rank: {'; '.join(refused)}. "
            "Restore one of them, or move the folder away to start afresh"
        )

    def _write(
        self,
        step: int,
        written: Path,
        *,
        planner: TreeSavePlanner,
        planned: list[Any],
        per_rank: Mapping[str, Any],
        facts: dict[str, Any],
    ) -> None:
        shared_writer = RawWriter(written, f"shared-{self._rank:05d}.bin", _METADATA)
        own_writer = RawWriter(written, f"rank-{self._rank:05d}.bin", _own_metadata(self._rank))
        if len(self._disk) > 1:
            plans = [plan_from_json(planned[rank]["plan"]) for rank in self._disk]
        else:
            plans = [planner.create_local_plan()]

        def write_files() -> Any:
            spread, self._metadata = planner.create_global_plan(plans)
            written.mkdir(exist_ok=True)
            results = shared_writer.write_data(spread[self._disk.index(self._rank)], planner).wait()
            save_state(per_rank, own_writer)
            return {"chunks": results_to_json(results), "files": shared_writer.files | own_writer.files}

        told = self._agreement.run(f"save of step {step}", write_files)

        def write_manifest() -> None:
            if not self._is_leader:
                return
            shared_writer.finish(self._metadata, [results_from_json(told[rank]["chunks"]) for rank in self._disk])
            files = dict(shared_writer.files)
            for rank in self._disk:
                files |= told[rank]["files"]
            manifest = {
                "format": 1,
                "step": step,
                "save_id": planned[0]["id"],
                "world_size": self._world_size,
                "disks": self.disks,
                "ranks": self._disk,
                "torch_version": str(torch.__version__),
                "facts": facts,
                "files": files,
            }
            generation_files.write_manifest(written, manifest)

        self._agreement.run(f"save of step {step}", write_manifest)

    def _try_to_load(
        self, generation: Generation, template: Mapping[str, Any], world_size_changed: str
    ) -> tuple[Loaded | None, list[str]]:
        """Read one generation; (None, reasons) if a rank finds it damaged. A mismatch raises on every rank."""
        manifest = generation.manifest
        assert manifest is not None
        read: list[Loaded] = []

        def reader(metadata_file: str) -> RawReader:
            return RawReader(generation.path, metadata_file, lambda names: generation_files.verify(generation, names))

        def read_all() -> None:
            same_world = manifest.world_size == self._world_size
            if not same_world and world_size_changed == "refuse":
                raise CheckpointMismatchError(
                    f"{generation.path.name} was written by {manifest.world_size} ranks, and this job has "
                    f"{self._world_size}: what each rank kept for itself has no owner. "
                    f"Start {manifest.world_size} ranks"
                )
            wanted = [self._rank] if same_world else list(range(manifest.world_size))
            absent = sorted(set(wanted) - set(manifest.ranks))
            if absent:
                raise CheckpointError(f"this disk has the states of ranks {manifest.ranks}, not of {absent}")
            own = {rank: load_state(reader(_own_metadata(rank)), {}) for rank in wanted}
            read.append(
                Loaded(
                    step=manifest.step,
                    path=generation.path,
                    shared=load_state(reader(_METADATA), template),
                    per_rank=own[self._rank] if same_world else None,
                    facts=manifest.facts,
                    world_size=manifest.world_size,
                    per_rank_of_all={} if same_world else own,
                )
            )

        try:
            self._agreement.run(f"load of step {generation.step}", read_all)
        except CheckpointMismatchError:
            raise
        except CheckpointError as error:
            return None, [f"{generation.path.name}: {error}"]
        return read[0], []

    def _take_up(self, loaded: Loaded, mine: list[Generation]) -> None:
        """From here on the run's history goes through `loaded`; what is newer or unreadable is of no use to it."""
        older = {g.path.name for g in mine if g.manifest is not None and g.step < loaded.step}
        self._ours = older | {loaded.path.name}
        self._abandoned = {g.path.name for g in mine} - self._ours

    def _refuse_old_run(self) -> None:
        found = generation_files.names(self.folder)
        if found and self.settings.resume == "never":
            raise CheckpointError(
                f'checkpoint.resume is "never", but {self.folder} holds {found[-1]}; choose another '
                'output folder, move that one away, or set checkpoint.resume to "auto"'
            )

    def _refuse_strangers(self) -> None:
        strangers = sorted(set(generation_files.names(self.folder)) - self._ours - self._abandoned)
        if strangers:
            raise CheckpointError(
                f"{self.folder} holds {strangers[-1]}, which this run neither wrote nor loaded; set "
                'checkpoint.resume to "auto" or choose another output folder'
            )

    def _prune(self, newest: Path) -> None:
        old = [name for name in generation_files.names(self.folder) if name != newest.name]
        keep = [name for name in old if name in self._ours][-(self.settings.keep - 1) :]
        for name in old:
            if name not in keep:
                generation_files.remove(self.folder / name)

    def _try_to(self, action: Any, *arguments: Any) -> None:
        """Tidy up; a failure costs disk space, not the checkpoint, so it is only told."""
        try:
            action(*arguments)
        except OSError as error:
            _log.warning("checkpoint: could not remove old files in %s: %s", self.folder, error)


def _refuse_lossy_facts(facts: dict[str, Any]) -> None:
    try:
        same = json.loads(json.dumps(facts, allow_nan=False)) == facts
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint: facts are not JSON values: {error}") from error
    if not same:
        raise ValueError("checkpoint: facts would change in JSON; use str keys and lists instead of tuples")


def _own_metadata(rank: int) -> str:
    return f"rank-{rank:05d}.json"
