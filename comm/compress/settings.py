"""`method: {kind: compress, ...}`: what is sent, what is remembered, and how the ranks combine it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from thinwire.comm.compress.auto import AnyChoice, Auto
from thinwire.comm.compress.collectives import CollectiveKind
from thinwire.comm.compress.combinations import check_auto, check_combination
from thinwire.comm.compress.feedback import EF, AnyFeedback
from thinwire.comm.settings import Settings


class CompressSettings(Settings):
    """Error-feedback compression of gradients.

    compressor: what C is; a name alone, such as int8, means its defaults. See comm/compress/compressors/. auto measures
      the first steps and then chooses for each tensor; see comm/compress/auto.py.
    feedback: what is remembered of what C left out; a name alone means its defaults. See comm/compress/feedback/.
    collective: how the ranks' messages become one mean; auto takes what suits the compressor.
    exact_within: name of a level of the mesh, such as node: its ranks average exactly in fp32, and only groups of
      ranks exchange compressed messages; null compresses between all ranks.
    dense_below: tensors of fewer elements are sent in fp32.
    start_step: this many first steps are sent in fp32; feedbacks other than none and ef learn from them.
    clip: where the trainer's clip_norm applies. "before": to the gradient itself, before C sees it, by the factor
      min(1, clip_norm / sqrt(mean_r ||g_r||^2)), which needs all gradients, so that none is sent while backward
      runs. "after": to the decoded mean; overlaps, but what is clipped off is lost and not remembered.
    seed: of all that is drawn at random.
    """

    kind: Literal["compress"] = "compress"
    compressor: AnyChoice
    feedback: AnyFeedback = EF()
    collective: Literal["auto"] | CollectiveKind = "auto"
    exact_within: str | None = Field(None, min_length=1)
    dense_below: int = Field(1024, ge=0)
    start_step: int = Field(0, ge=0)
    clip: Literal["before", "after"] = "before"
    seed: int = Field(0, ge=0, lt=1 << 63)

    @model_validator(mode="after")
    def _fit_together(self) -> CompressSettings:
        exact_within = self.exact_within is not None
        if isinstance(self.compressor, Auto):
            check_auto(self.compressor.candidates, self.feedback, self.collective)
        else:
            check_combination(self.compressor, self.feedback, self.collective, exact_within=exact_within)
        return self


def make_settings(**given: Any) -> CompressSettings:
    """The settings that a call has given.

    Raises:
        ValueError: one line for each that cannot be used.
    """
    try:
        return CompressSettings(**given)
    except ValidationError as error:
        lines = [_sentence(detail) for detail in error.errors(include_url=False)]
        raise ValueError("\n".join(dict.fromkeys(lines))) from None


def _sentence(detail: ErrorDetails) -> str:
    path = ".".join(map(str, detail["loc"]))
    said = detail["msg"].removeprefix("Value error, ")
    return f"{path}: {detail['input']!r}: {said}" if path else said
