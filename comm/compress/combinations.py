"""Which compressors, feedbacks and collectives go together; the others are refused before anything is built."""

from __future__ import annotations

from collections.abc import Sequence

from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors.rand_k import RandK
from thinwire.comm.compress.feedback import DGC, FeedbackSettings
from thinwire.comm.compress.feedback.ef21 import EF21BC
from thinwire.comm.compress.routes import is_global

_COLLECTIVES_WITH_WEIGHTS = ("auto", "all_gather", "two_shot")


def check_combination(
    compressor: Compressor, feedback: FeedbackSettings, collective: str, *, exact_within: bool
) -> None:
    """Refuse what cannot work, or would silently do something else than its name says.

    Args:
        exact_within: whether some ranks average exactly before they compress.
    Raises:
        ValueError: says which settings exclude each other, why, and what to give instead.
    """
    kind = _kind_of(compressor)
    cuttable = compressor.elementwise and compressor.fixed_size and not compressor.sparse
    if collective == "two_shot" and not cuttable:
        raise ValueError(
            f"collective: two_shot cuts one flat tensor into slices of known size, which compressor {kind} does not "
            "allow; give collective: auto"
        )
    if collective in ("leader_indices", "balanced") and not compressor.sparse:
        raise ValueError(
            f"collective: {collective} exchanges indices, and compressor {kind} has none; give a sparse one (topk, "
            "threshold, randk) or collective: auto"
        )
    if collective == "contributor_mean":
        _check_contributor_mean(compressor, feedback)
    if isinstance(feedback, EF21BC):
        _check_both_directions(kind, collective, cuttable=cuttable, exact_within=exact_within)
    if isinstance(feedback, DGC):
        _check_dgc(compressor, feedback, exact_within=exact_within)
    if _kind_of(feedback) in ("ef21_w", "ef21_pp"):
        if exact_within:
            raise ValueError(
                f"feedback: {_kind_of(feedback)} weighs single ranks, but with exact_within whole groups of ranks send "
                "one message; give exact_within: null or another feedback"
            )
        if collective not in _COLLECTIVES_WITH_WEIGHTS or kind == "lowrank":
            raise ValueError(
                f"feedback: {_kind_of(feedback)} weighs the ranks' messages, which "
                f"{'compressor lowrank' if kind == 'lowrank' else f'collective {collective}'} cannot; give collective: "
                "all_gather or two_shot with another compressor, or feedback: ef21"
            )


def check_auto(candidates: Sequence[Compressor], feedback: FeedbackSettings, collective: str) -> None:
    """Refuse what does not go with a compressor that is chosen later.

    Raises:
        ValueError: says which settings exclude each other, why, and what to give instead.
    """
    kind = _kind_of(feedback)
    if kind not in ("none", "ef"):
        raise ValueError(
            f"feedback: {kind} remembers something of every step, but compressor auto sends the first ones dense and "
            "chooses then; give feedback: ef or none"
        )
    if collective != "auto":
        raise ValueError(
            f"collective: {collective} does not suit all compressors between which auto chooses; give collective: auto"
        )
    for candidate in candidates:
        if is_global(candidate):
            raise ValueError(
                f"compressor.candidates: {_kind_of(candidate)} of scope global takes all tensors together, but auto "
                "chooses for each; give scope: tensor"
            )


def _check_contributor_mean(compressor: Compressor, feedback: FeedbackSettings) -> None:
    if not compressor.sparse or isinstance(compressor, RandK):
        raise ValueError(
            f"collective: contributor_mean divides each element by the number of ranks that sent it, but compressor "
            f"{_kind_of(compressor)} sends the same ones on every rank; give topk or threshold, or collective: auto"
        )
    if _kind_of(feedback) not in ("none", "ef", "dgc"):
        raise ValueError(
            f"feedback: {_kind_of(feedback)} keeps the mean over all ranks of what they sent, which collective "
            "contributor_mean does not give; give feedback: ef, dgc or none, or collective: all_gather"
        )


def _check_both_directions(kind: str, collective: str, *, cuttable: bool, exact_within: bool) -> None:
    if collective not in ("auto", "two_shot") or not cuttable:
        raise ValueError(
            f"feedback: ef21_bc compresses the mean too, at the owner of each slice: collective two_shot with a dense "
            f"compressor (int8, int4, ternary, sign, bf16, fp16), not {collective} with {kind}; or give feedback: ef21"
        )
    if exact_within:
        raise ValueError("feedback: ef21_bc has no form with exact_within; give exact_within: null or feedback: ef21")


def _check_dgc(compressor: Compressor, feedback: DGC, *, exact_within: bool) -> None:
    if exact_within:
        raise ValueError(
            "feedback: dgc masks the entries that this rank has sent, but with exact_within a whole group sends one "
            "message; give exact_within: null or feedback: ef"
        )
    if not compressor.sparse:
        raise ValueError(
            f"feedback: dgc forgets the momentum of entries that were sent, and compressor {_kind_of(compressor)} "
            "sends all of them; give topk, threshold or randk, or feedback: ef"
        )
    if feedback.warmup_steps and getattr(compressor, "density", None) is None:
        raise ValueError(
            "feedback.warmup_steps: dgc warms up by a falling density, but the compressor is given k; give "
            "compressor.density instead, or warmup_steps: 0"
        )


def _kind_of(settings: Compressor | FeedbackSettings) -> str:
    return str(getattr(settings, "kind", type(settings).__name__))
