"""One file per compressor: its settings, and the encoding and decoding of one tensor."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias, get_args

from pydantic import BeforeValidator, Field

from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors.block_quantized import Int4, Int8, Ternary
from thinwire.comm.compress.compressors.dense import BF16, FP16, Dense
from thinwire.comm.compress.compressors.low_rank import LowRank
from thinwire.comm.compress.compressors.natural import Natural
from thinwire.comm.compress.compressors.rand_k import RandK
from thinwire.comm.compress.compressors.sign import Sign
from thinwire.comm.compress.compressors.ternary_cluster import TernaryCluster
from thinwire.comm.compress.compressors.threshold import Threshold
from thinwire.comm.compress.compressors.top_k import TopK

_Each: TypeAlias = (
    Dense | BF16 | FP16 | Int8 | Int4 | Ternary | Sign | Natural | TopK | RandK | Threshold | LowRank | TernaryCluster
)
_BY_KIND: dict[str, type[Compressor]] = {cls.model_fields["kind"].default: cls for cls in get_args(_Each)}


def _from_name(given: Any) -> Any:
    return {"kind": given} if isinstance(given, str) else given


AnyCompressor: TypeAlias = Annotated[_Each, Field(discriminator="kind"), BeforeValidator(_from_name)]
"""Settings of any compressor, by `kind`; a string is the kind with its defaults."""


def parse_compressor(given: str | Compressor, *, where: str = "compressor") -> Compressor:
    """The compressor itself, or that of a name like "int8", with its defaults.

    Args: where, the path of the setting, for the error.
    Raises:
        ValueError: not a compressor, or not the name of one.
    """
    if isinstance(given, Compressor):
        return given
    kind = _BY_KIND.get(given) if isinstance(given, str) else None
    if kind is None:
        known = ", ".join(f'"{name}"' for name in _BY_KIND)
        raise ValueError(
            f"{where}: {given!r} is not a compressor; give one of {known}, or settings such as TopK(density=0.01)"
        )
    return kind()
