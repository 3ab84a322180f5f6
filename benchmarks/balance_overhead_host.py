"""One rank of benchmarks/balance_overhead.py: a plain PyTorch loop over a GPT with experts, balanced in turns.

    python benchmarks/balance_overhead_host.py FOLDER SETTINGS(JSON)

Writes FOLDER/RANK.json: of each way and block of steps the seconds, those in which the processor worked for this rank,
those for which somebody waited for counts, messages and bytes. The text is random and the weights hardly move: what is
learned does not matter here.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from balance_overhead_ways import Balancing, WaitInEveryLayer, all_reduce, one_latency
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.parallel import DistributedDataParallel

import thinwire as tw
from thinwire.dist.models import build_model
from thinwire.dist.models.gpt import Block
from thinwire.dist.models.moe import MoEGPT, MoESettings
from thinwire.dist.world import World, WorldSettings

VOCAB = 256
COEF = 1e-2


class Steps:
    """Optimizer steps of one model, its micro-batches one after another or all forward passes first."""

    def __init__(self, model: MoEGPT, network: nn.Module, settings: dict[str, Any], seed: int) -> None:
        self.model = model
        self._network = network
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        draw = torch.Generator().manual_seed(seed)
        shape = (settings["micro_batches"], settings["batch"], settings["model"]["context"] + 1)
        self._tokens = torch.randint(VOCAB, shape, generator=draw)

    def alternating(self) -> None:
        """Forward and backward of each micro-batch; gradients are exchanged in the last one."""
        for number, tokens in enumerate(self._tokens):
            is_last = number + 1 == len(self._tokens)
            with nullcontext() if is_last else self._unsynchronised():
                self._loss(tokens).backward()
        self._end()

    def forward_first(self) -> None:
        """All forward passes, then one backward pass of the summed losses."""
        losses = []
        for number, tokens in enumerate(self._tokens):
            is_last = number + 1 == len(self._tokens)
            with nullcontext() if is_last else self._unsynchronised():
                losses.append(self._loss(tokens))
        torch.stack(losses).sum().backward()
        self._end()

    def evaluate(self) -> None:
        """One forward pass in eval mode."""
        self.model.eval()
        with torch.no_grad():
            self._loss(self._tokens[0])
        self.model.train()

    def _loss(self, tokens: Tensor) -> Tensor:
        scores = self._network(tokens[:, :-1]).flatten(0, 1)
        return F.cross_entropy(scores, tokens[:, 1:].flatten()) / len(self._tokens)

    def _unsynchronised(self) -> Any:
        return self._network.no_sync() if isinstance(self._network, DistributedDataParallel) else nullcontext()

    def _end(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()


def main() -> None:
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    world = tw.init(WorldSettings(threads=1, timeout_s=120.0))
    shape = MoESettings.model_validate(settings["model"])
    model = build_model(shape, tokenizer_vocab=VOCAB, seed=0, device=torch.device("cpu"))
    assert isinstance(model, MoEGPT)
    network = with_gradients(model, settings["gradients"], world)
    steps = Steps(model, network, settings, seed=1000 + world.rank)
    ways = build_ways(shape, settings, world)
    told: dict[str, Any] = {way: {"blocks": []} for way in settings["ways"]}
    for turn in range(settings["rounds"]):
        if world.rank == 0:
            print(f"round {turn + 1} of {settings['rounds']}", flush=True)
        often = [way for way in settings["ways"] if turn % settings["ways"][way] == 0]
        for way in often if turn % 2 == 0 else often[::-1]:
            told[way]["blocks"].append({"round": turn, **block(way, ways[way], steps, settings["steps"], world)})
    for way in settings["ways"]:
        told[way]["predicted_bytes"] = ways[way].predicted_bytes
        told[way]["messages_in_eval"] = messages_of(steps.evaluate, ways[way], steps)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    for way in settings["ways"]:
        step = step_of(way, steps)
        messages_of(step, ways[way], steps)
        told[way]["messages_recomputed"] = messages_of(step, ways[way], steps)
    dist.barrier()
    (folder / f"{world.rank}.json").write_text(json.dumps(told))
    world.close()


def with_gradients(model: nn.Module, gradients: str, world: World) -> nn.Module:
    """How gradients are exchanged: in 4 bits, or not at all, as in the local steps of DiLoCo."""
    if gradients == "none":
        return model
    assert gradients == "int4", gradients
    ddp = DistributedDataParallel(model, process_group=world.group, gradient_as_bucket_view=True)
    tw.compress(ddp, compressor="int4", queue=world.queue)
    return ddp


def build_ways(shape: MoESettings, settings: dict[str, Any], world: World) -> dict[str, Balancing]:
    """Every way to balance, each on a queue of its own."""
    queues = {way: world.queue.beside(way.replace(" ", "_")) for way in settings["ways"]}

    def mode(way: str, **options: Any) -> Balancing:
        units = settings["micro_batches"]
        return Balancing(
            tw.LoadBalance(
                num_experts=shape.experts,
                top_k=shape.top_k,
                coef=COEF,
                micro_batches=units,
                queue=queues[way],
                **options,
            ),
            queues[way],
        )

    def in_every_layer(way: str, add_up: Callable[..., Tensor]) -> Balancing:
        pull = COEF * shape.experts / (settings["batch"] * shape.context * settings["micro_batches"])
        return Balancing(WaitInEveryLayer(queues[way], add_up, shape.experts, shape.top_k, pull), queues[way])

    makers: dict[str, Callable[[str], Balancing]] = {
        "none": lambda way: Balancing(None, queues[way]),
        "micro": lambda way: mode(way, scope="micro"),
        "stale": lambda way: mode(way, mode="stale"),
        "late, forwards first": lambda way: mode(way, mode="late"),
        "sync": lambda way: mode(way, mode="sync"),
        "every layer, one latency": lambda way: in_every_layer(way, one_latency),
        "every layer, all-reduce": lambda way: in_every_layer(way, all_reduce),
    }
    return {way: makers[way](way) for way in settings["ways"]}


def step_of(way: str, steps: Steps) -> Callable[[], None]:
    return steps.forward_first if way.endswith("forwards first") else steps.alternating


def block(way: str, balancing: Balancing, steps: Steps, repeats: int, world: World) -> dict[str, Any]:
    """Some steps in one way, begun together; not timed is the first one, whose predecessor has sent nothing."""
    balancing.enter(steps.model)
    step = step_of(way, steps)
    dist.barrier(world.group)
    messages, sent = balancing.messages, balancing.sent_bytes
    step()
    waited_s, began, worked_s = balancing.waited_s, time.monotonic(), time.process_time()
    for _ in range(repeats):
        step()
    seconds, waited_s = time.monotonic() - began, balancing.waited_s - waited_s
    worked_s = time.process_time() - worked_s
    balancing.finish()
    return {
        "step_s": seconds / repeats,
        "worked_s": worked_s / repeats,
        "waited_s": waited_s / repeats,
        "messages": (balancing.messages - messages) / (repeats + 1),
        "sent_bytes": (balancing.sent_bytes - sent) / (repeats + 1),
    }


def messages_of(step: Callable[[], None], balancing: Balancing, steps: Steps) -> int:
    balancing.enter(steps.model)
    before = balancing.messages
    step()
    return balancing.messages - before


if __name__ == "__main__":
    main()
