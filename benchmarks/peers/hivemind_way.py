"""hivemind's Optimizer: gradients are averaged by groups that peers form through a distributed hash table."""

from __future__ import annotations

import time

import hivemind
import torch

from peers.peer import EVERY, Job, Peer
from thinwire.dist.data import Batch, shard

MATCHMAKING_S = 3.0  # what hivemind's manual gives for small local runs
PATIENCE_S = 300.0


class Hivemind(Peer):
    """A step is one of hivemind's epochs: until the swarm has the global batch, and its gradients are averaged.

    A peer that has done its share meanwhile goes on with further batches, as hivemind's peers do.
    """

    def __init__(self, job: Job) -> None:
        model = job.model()
        contacts = job.folder / "hivemind_contacts"
        began = time.monotonic()
        while job.rank and not contacts.exists():
            if time.monotonic() - began > PATIENCE_S:
                raise TimeoutError("rank 0 has not started its hash table")
            time.sleep(0.05)
        self._table = hivemind.DHT(
            host_maddrs=[f"/ip4/{job.address}/tcp/0"],
            initial_peers=contacts.read_text().split() if job.rank else None,
            start=True,
        )
        if job.rank == 0:
            unfinished = contacts.with_suffix(".tmp")
            unfinished.write_text("\n".join(str(address) for address in self._table.get_visible_maddrs()))
            unfinished.replace(contacts)
        inner = job.optimizer(model)
        clip_norm = job.config.train.clip_norm

        def clip(*_: object) -> None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)

        inner.register_step_pre_hook(clip)
        self._swarm = hivemind.Optimizer(
            dht=self._table,
            run_id="benchmark",
            optimizer=inner,
            batch_size_per_step=job.config.train.share(job.size)[0],
            target_batch_size=job.config.train.global_batch,
            matchmaking_time=MATCHMAKING_S,
            averaging_timeout=PATIENCE_S,
            average_state_every=EVERY,
            delay_state_averaging=False,
        )
        self._further = 0
        super().__init__(job, model, model, self._swarm)

    def step(self, batch: Batch, lr: float) -> float:
        for group in self._swarm.param_groups:
            group["lr"] = lr
        epoch, began = self._swarm.local_epoch, time.monotonic()
        total, batches = 0.0, 0
        while self._swarm.local_epoch == epoch:
            loss = self.loss(batch)
            loss.backward()
            self._swarm.step()
            self._swarm.zero_grad()
            total += float(loss.detach())
            batches += 1
            batch = self._further_batch()
            if time.monotonic() - began > PATIENCE_S:
                raise TimeoutError(f"epoch {epoch} has not ended after {PATIENCE_S:.0f} s")
        return total / batches

    def _further_batch(self) -> Batch:
        """Of samples that no step of the run has."""
        job, train = self.job, self.job.config.train
        samples = shard(train.steps + self._further, train.global_batch, job.rank, job.size)
        self._further += 1
        return job.data.training_batch(samples, torch.device("cpu"))
