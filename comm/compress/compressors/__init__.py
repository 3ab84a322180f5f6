"""One file per compressor: its settings, and the encoding and decoding of one tensor."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Field

from thinwire.comm.compress.compressors.block_quantized import Int4, Int8, Ternary
from thinwire.comm.compress.compressors.dense import BF16, FP16, Dense
from thinwire.comm.compress.compressors.low_rank import LowRank
from thinwire.comm.compress.compressors.natural import Natural
from thinwire.comm.compress.compressors.rand_k import RandK
from thinwire.comm.compress.compressors.sign import Sign
from thinwire.comm.compress.compressors.ternary_cluster import TernaryCluster
from thinwire.comm.compress.compressors.threshold import Threshold
from thinwire.comm.compress.compressors.top_k import TopK

EachCompressor: TypeAlias = (
    Dense | BF16 | FP16 | Int8 | Int4 | Ternary | Sign | Natural | TopK | RandK | Threshold | LowRank | TernaryCluster
)


def from_name(given: Any) -> Any:
    """Settings of a kind with its defaults, where only its name is given."""
    return {"kind": given} if isinstance(given, str) else given


AnyCompressor: TypeAlias = Annotated[EachCompressor, Field(discriminator="kind"), BeforeValidator(from_name)]
"""Settings of any compressor, by `kind`; a string is the kind with its defaults."""
