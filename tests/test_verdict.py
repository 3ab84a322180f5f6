"""Verdicts: every combination of answers blames the right ranks."""

from __future__ import annotations

from thinwire.comm.verdict import Progress, Survey, draw_verdict

HERE = Progress(7, "allreduce/bucket1", finished=False)
PEERS = [10, 20, 30, 40]  # job ranks of the group's members


def judge(survey: Survey):
    return draw_verdict("queue", HERE, 0, PEERS, "not finished 5 s after its start", survey)


def test_silence_outweighs_lateness() -> None:
    verdict = judge(Survey({1: Progress(3, "x"), 2: HERE}, silent=(3,)))
    assert (verdict.kind, verdict.ranks) == ("lost", (40,))
    assert "No answer from rank 40: dead, stopped or cut off. Answered: ranks 10, 20, 30." in verdict.message


def test_ranks_behind_are_late_and_said_to_be_where_they_are() -> None:
    verdict = judge(Survey({1: HERE, 2: Progress(6, "eval", finished=False), 3: Progress()}))
    assert (verdict.kind, verdict.ranks) == ("late", (30, 40))
    assert "rank 30 is in eval (operation 6); rank 40 has not begun any operation" in verdict.message


def test_another_name_at_the_same_number_is_a_disagreement() -> None:
    verdict = judge(Survey({1: Progress(7, "allreduce/bucket2"), 2: HERE, 3: HERE}))
    assert (verdict.kind, verdict.ranks) == ("failed", (20,))
    assert "disagree" in verdict.message


def test_everybody_there_means_a_slow_or_broken_link() -> None:
    verdict = judge(Survey({1: HERE, 2: HERE, 3: Progress(9, "later")}))
    assert (verdict.kind, verdict.ranks) == ("late", ())
    assert "link is too slow" in verdict.message
