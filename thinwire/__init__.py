"""Train neural networks over thin wires: the public API, loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from thinwire.comm.allreduce import allreduce as allreduce
    from thinwire.comm.balance.balance import LoadBalance as LoadBalance
    from thinwire.comm.balance.errors import NonFiniteLogitsError as NonFiniteLogitsError
    from thinwire.comm.balance.errors import RouterError as RouterError
    from thinwire.comm.balance.hugging_face import balance_hf as balance_hf
    from thinwire.comm.compress.auto import Auto as Auto
    from thinwire.comm.compress.compressors.block_quantized import Int4 as Int4
    from thinwire.comm.compress.compressors.block_quantized import Int8 as Int8
    from thinwire.comm.compress.compressors.block_quantized import Ternary as Ternary
    from thinwire.comm.compress.compressors.dense import BF16 as BF16
    from thinwire.comm.compress.compressors.dense import FP16 as FP16
    from thinwire.comm.compress.compressors.dense import Dense as Dense
    from thinwire.comm.compress.compressors.low_rank import LowRank as LowRank
    from thinwire.comm.compress.compressors.natural import Natural as Natural
    from thinwire.comm.compress.compressors.rand_k import RandK as RandK
    from thinwire.comm.compress.compressors.sign import Sign as Sign
    from thinwire.comm.compress.compressors.ternary_cluster import TernaryCluster as TernaryCluster
    from thinwire.comm.compress.compressors.threshold import Threshold as Threshold
    from thinwire.comm.compress.compressors.top_k import TopK as TopK
    from thinwire.comm.compress.door import compress as compress
    from thinwire.comm.compress.feedback.classic import EF as EF
    from thinwire.comm.compress.feedback.dgc import DGC as DGC
    from thinwire.comm.compress.feedback.econtrol import EControl as EControl
    from thinwire.comm.compress.feedback.ef21 import EF21 as EF21
    from thinwire.comm.compress.feedback.ef21 import EF21BC as EF21BC
    from thinwire.comm.compress.feedback.ef21_variants import EF21PP as EF21PP
    from thinwire.comm.compress.feedback.ef21_variants import EF21SGDM as EF21SGDM
    from thinwire.comm.compress.feedback.ef21_weighted import EF21W as EF21W
    from thinwire.comm.compress.feedback.ef21_weighted import SmoothnessEstimate as SmoothnessEstimate
    from thinwire.comm.compress.standalone import CompressedMean as CompressedMean
    from thinwire.comm.errors import CommError as CommError
    from thinwire.comm.errors import NonFiniteGradientError as NonFiniteGradientError
    from thinwire.comm.errors import NonFiniteWeightsError as NonFiniteWeightsError
    from thinwire.comm.errors import OwnWeightsError as OwnWeightsError
    from thinwire.comm.errors import PeerFailedError as PeerFailedError
    from thinwire.comm.errors import PeerLateError as PeerLateError
    from thinwire.comm.errors import PeerLostError as PeerLostError
    from thinwire.comm.gossip.budget import BudgetSettings as ByteBudget  # noqa: F401
    from thinwire.comm.gossip.door import gossip as gossip
    from thinwire.comm.gossip.post.machines import MachinesSettings as MachinesSettings
    from thinwire.comm.gossip.schedule import SingleMergeSettings as SingleMerge  # noqa: F401
    from thinwire.comm.local_sgd.door import local_sgd as local_sgd
    from thinwire.comm.onebyte.errors import ModelMismatchError as ModelMismatchError
    from thinwire.comm.onebyte.errors import WeightRangeError as WeightRangeError
    from thinwire.comm.onebyte.membership.door import elastic as elastic
    from thinwire.comm.onebyte.membership.errors import NoQuorumError as NoQuorumError
    from thinwire.comm.onebyte.membership.settings import MembershipSettings as MembershipSettings
    from thinwire.comm.onebyte.optimizer import OneByteSPSA as OneByteSPSA
    from thinwire.comm.partition.deepspeed_comm import deepspeed_comm as deepspeed_comm
    from thinwire.comm.partition.door import partition as partition
    from thinwire.dist.adapters.accelerate import for_accelerate as for_accelerate
    from thinwire.dist.adapters.fabric import for_fabric as for_fabric
    from thinwire.dist.adapters.hf_trainer import for_hf_trainer as for_hf_trainer
    from thinwire.dist.adapters.lightning import for_lightning as for_lightning
    from thinwire.launch.join import init as init

# Name -> module that defines it (and its name there, if that is another). Nothing here imports torch until it is used.
_PUBLIC = {
    "Auto": "thinwire.comm.compress.auto",
    "BF16": "thinwire.comm.compress.compressors.dense",
    "ByteBudget": "thinwire.comm.gossip.budget:BudgetSettings",
    "CommError": "thinwire.comm.errors",
    "CompressedMean": "thinwire.comm.compress.standalone",
    "DGC": "thinwire.comm.compress.feedback.dgc",
    "Dense": "thinwire.comm.compress.compressors.dense",
    "EControl": "thinwire.comm.compress.feedback.econtrol",
    "EF": "thinwire.comm.compress.feedback.classic",
    "EF21": "thinwire.comm.compress.feedback.ef21",
    "EF21BC": "thinwire.comm.compress.feedback.ef21",
    "EF21PP": "thinwire.comm.compress.feedback.ef21_variants",
    "EF21SGDM": "thinwire.comm.compress.feedback.ef21_variants",
    "EF21W": "thinwire.comm.compress.feedback.ef21_weighted",
    "FP16": "thinwire.comm.compress.compressors.dense",
    "Int4": "thinwire.comm.compress.compressors.block_quantized",
    "Int8": "thinwire.comm.compress.compressors.block_quantized",
    "LoadBalance": "thinwire.comm.balance.balance",
    "LowRank": "thinwire.comm.compress.compressors.low_rank",
    "Natural": "thinwire.comm.compress.compressors.natural",
    "MachinesSettings": "thinwire.comm.gossip.post.machines",
    "MembershipSettings": "thinwire.comm.onebyte.membership.settings",
    "ModelMismatchError": "thinwire.comm.onebyte.errors",
    "NoQuorumError": "thinwire.comm.onebyte.membership.errors",
    "NonFiniteGradientError": "thinwire.comm.errors",
    "NonFiniteLogitsError": "thinwire.comm.balance.errors",
    "NonFiniteWeightsError": "thinwire.comm.errors",
    "OneByteSPSA": "thinwire.comm.onebyte.optimizer",
    "OwnWeightsError": "thinwire.comm.errors",
    "PeerFailedError": "thinwire.comm.errors",
    "PeerLateError": "thinwire.comm.errors",
    "PeerLostError": "thinwire.comm.errors",
    "RandK": "thinwire.comm.compress.compressors.rand_k",
    "RouterError": "thinwire.comm.balance.errors",
    "Sign": "thinwire.comm.compress.compressors.sign",
    "SingleMerge": "thinwire.comm.gossip.schedule:SingleMergeSettings",
    "SmoothnessEstimate": "thinwire.comm.compress.feedback.ef21_weighted",
    "Ternary": "thinwire.comm.compress.compressors.block_quantized",
    "TernaryCluster": "thinwire.comm.compress.compressors.ternary_cluster",
    "Threshold": "thinwire.comm.compress.compressors.threshold",
    "TopK": "thinwire.comm.compress.compressors.top_k",
    "WeightRangeError": "thinwire.comm.onebyte.errors",
    "allreduce": "thinwire.comm.allreduce",
    "balance_hf": "thinwire.comm.balance.hugging_face",
    "compress": "thinwire.comm.compress.door",
    "deepspeed_comm": "thinwire.comm.partition.deepspeed_comm",
    "elastic": "thinwire.comm.onebyte.membership.door",
    "for_accelerate": "thinwire.dist.adapters.accelerate",
    "for_fabric": "thinwire.dist.adapters.fabric",
    "for_hf_trainer": "thinwire.dist.adapters.hf_trainer",
    "for_lightning": "thinwire.dist.adapters.lightning",
    "gossip": "thinwire.comm.gossip.door",
    "init": "thinwire.launch.join",
    "local_sgd": "thinwire.comm.local_sgd.door",
    "partition": "thinwire.comm.partition.door",
}

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'thinwire' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, _, there = _PUBLIC[name].partition(":")
    return getattr(importlib.import_module(module), there or name)


def __dir__() -> list[str]:
    return sorted(__all__)
