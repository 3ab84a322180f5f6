"""What compression cannot do, it refuses before anything is sent or registered, and says what to do instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compress_models import (
    TOPK,
    make_model,
    wrap,
)
from ranks import Rank, gloo_group, run_ranks
from torch import nn
from torch.distributed import PrefixStore
from torch.distributed.fsdp import FullyShardedDataParallel

from thinwire.comm.compress.compressors import TopK
from thinwire.comm.compress.door import compress
from thinwire.comm.compress.feedback import EF

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown compressor": ({"compressor": "topkk"}, r"compressor.*'topkk'"),
    "unknown feedback": ({"feedback": "ef22"}, r"feedback.*'ef22'"),
    "unknown collective": ({"collective": "ring"}, r"collective.*'ring'"),
    "two-shot of indices": ({"collective": "two_shot"}, "collective: two_shot.*does not allow; give collective: auto"),
    "leader without indices": ({"compressor": "int8", "collective": "leader_indices"}, "compressor int8 has none"),
    "balanced without indices": ({"compressor": "lowrank", "collective": "balanced"}, "compressor lowrank has none"),
    "both directions of indices": ({"feedback": "ef21_bc"}, "ef21_bc compresses the mean too.*not auto with topk"),
    "both directions of factors": ({"compressor": "lowrank", "feedback": "ef21_bc"}, "not auto with lowrank"),
    "both directions by all-gather": (
        {"compressor": "int8", "feedback": "ef21_bc", "collective": "all_gather"},
        "not all_gather with int8",
    ),
    "masking without places": ({"compressor": "int8", "feedback": "dgc"}, "give topk, threshold or randk"),
    "warm-up of a fixed k": (
        {"compressor": TopK(k=5), "feedback": {"kind": "dgc", "warmup_steps": 3}},
        "give compressor.density instead",
    ),
    "weights by a leader": ({"feedback": "ef21_pp", "collective": "leader_indices"}, "weighs the ranks' messages"),
    "weights of factors": ({"compressor": "lowrank", "feedback": "ef21_w"}, "compressor lowrank cannot"),
    "updates without a learning rate": ({"feedback": EF(units="update")}, "learning rate"),
    "negative limit": ({"clip_norm": -1.0}, "clip_norm: -1.0"),
    "nan limit": ({"clip_norm": float("nan")}, "clip_norm: nan"),
    "misspelt setting": ({"compressor": {"kind": "topk", "densty": 0.1}}, "densty"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()
        model = wrap(rank, make_model())
        with pytest.raises(ValueError, match=message):
            compress(model, **{"compressor": TOPK, "queue": queue, **options})
        assert not model._comm_hooks
        queue.close()

    run_ranks(1, work)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_models_that_cannot_be_hooked_are_refused() -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()

        def refuse(model: nn.Module, message: str, **options: Any) -> None:
            with pytest.raises(ValueError, match=message):
                compress(model, compressor="int8", queue=queue, **options)

        refuse(make_model(), "got Sequential; wrap the model first: DistributedDataParallel")
        refuse(wrap(rank, make_model(), static_graph=True), "static_graph=True.*no_sync")
        refuse(
            wrap(rank, make_model(), find_unused_parameters=True), r"find_unused_parameters=True.*requires_grad_\(False"
        )
        refuse(wrap(rank, make_model().double()), r"parameter 0\.weight is torch\.float64")
        refuse(wrap(rank, make_model().to(torch.complex64)), r"parameter 0\.weight is torch\.complex64")
        refuse(wrap(rank, nn.Sequential(nn.Embedding(4, 4, sparse=True))), "0 makes sparse gradients")
        model = wrap(rank, make_model())
        compress(model, compressor="int8", queue=queue)
        refuse(model, "already has a communication hook")
        sharded = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
        nn.Module.__init__(sharded)
        refuse(sharded, "FullyShardedDataParallel.*fully_shard")
        momentum = torch.optim.AdamW(make_model().parameters())
        options = {"compressor": TopK(density=0.1), "feedback": "dgc", "optimizer": momentum, "queue": queue}
        with pytest.raises(ValueError, match=r"AdamW\) has 0.9 of its own"):
            compress(wrap(rank, make_model()), **options)
        with pytest.raises(ValueError, match="not its own state"):
            compress(wrap(rank, make_model()), compressor="int8", queue=queue).load_state_dict({"momentum": 1})
        state = compress(wrap(rank, make_model()), compressor="int8", dense_below=9, queue=queue).state_dict()
        with pytest.raises(ValueError, match=r"method\.compressor: the checkpoint was written with .*int8"):
            compress(wrap(rank, make_model()), compressor="lowrank", dense_below=9, queue=queue).load_state_dict(state)
        assert queue.meter.snapshot()["operations"] == {}
        queue.close()

    run_ranks(1, work)


def test_a_queue_of_other_ranks_is_refused() -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()
        alone = Rank(0, 1, rank.store, rank.group)
        if rank.rank == 0:
            alone.group = gloo_group(PrefixStore("alone", rank.store), 0, 1, "alone")
            with pytest.raises(ValueError, match="queue: it joins 2 ranks, the model's process group 1"):
                compress(wrap(alone, make_model()), compressor="int8", queue=queue)
        queue.close()

    run_ranks(2, work)
