"""Machines of a simulated run fail, each in one way, come and go: the others go on, and none has another history."""

from __future__ import annotations

import pytest
from onebyte_simulation import (
    RUN,
    SNAPSHOT_EVERY,
    Numbers,
    Simulation,
    everyone_goes_on,
    leader,
    records,
    together,
)

from thinwire.comm.forecast import seat_of
from thinwire.comm.onebyte.forecast import forecast_membership
from thinwire.comm.onebyte.membership import messages
from thinwire.comm.onebyte.membership.connections import packed_bytes
from thinwire.comm.onebyte.membership.errors import HistoryError, ModelMismatchError, RefusedError
from thinwire.comm.onebyte.membership.frame import pack_frame, parse_frame
from thinwire.comm.onebyte.membership.promise import Promise
from thinwire.comm.onebyte.rounds import Round
from thinwire.comm.onebyte.settings import OneByteSettings


@pytest.mark.parametrize("machines", [1, 2, 4])
def test_a_round_costs_each_member_one_frame_and_the_leader_one_proposal_each(machines: int) -> None:
    run = together(machines)
    first = run.rounds
    run.run_until(lambda: run.rounds > first, 10)
    run.sent = []
    # From one snapshot to the next there is nothing but rounds.
    run.run_until(lambda: run.rounds % SNAPSHOT_EVERY == 1 and leader(run).ledger.log.rounds > first + 3, 30)
    run.sent = []
    run.run_until(lambda: run.rounds % SNAPSHOT_EVERY == 5, 30)
    assert all(isinstance(sent, bytes | messages.Propose) for _, _, sent in run.sent)
    frames = [sent for _, _, sent in run.sent if isinstance(sent, bytes)]
    assert 3 * (machines - 1) <= len(frames) <= 5 * (machines - 1)
    assert all(len(frame) == 24 + 3 for frame in frames)
    proposals = [sent for _, _, sent in run.sent if isinstance(sent, messages.Propose)]
    assert 3 * (machines - 1) <= len(proposals) <= 5 * (machines - 1)
    assert not any(p.confirm for p in proposals)
    if machines > 1:
        place = seat_of([("world", machines)], 0)
        (foretold,) = forecast_membership(OneByteSettings(samples=3), [], place, rate_changes=True).exchanges
        assert {(machines - 1) * packed_bytes(p) for p in proposals} == {foretold.sent_bytes["world"]}


@pytest.mark.parametrize("fault", ["killed", "stopped", "cut off"])
@pytest.mark.parametrize("who", ["leader", "member"])
def test_one_of_three_is_lost_and_comes_back(fault: str, who: str) -> None:
    run = together(3, deadline_s=20.0)
    victim = leader(run) if who == "leader" else next(m for m in run.machines if not m.core.leads)
    others = [m for m in run.machines if m is not victim]
    before = run.rounds
    began = run.now
    if fault == "killed":
        victim.kill()
    elif fault == "stopped":
        victim.stopped = True
    else:
        run.group = {victim.address: 1}
    run.run_until(lambda: all(m.ledger.log.rounds >= before + 3 for m in others), 30)
    assert run.now - began < 3 * 2.0 + 3 * 1.5, "not the deadline, but the silence tells"
    if fault == "cut off":
        committed = victim.ledger.committed
        run.run_for(10)
        assert victim.ledger.committed <= committed + 1, "a minority commits nothing new"
        assert not victim.core.leads
    slot = victim.core.place.slot
    run.group = {}
    victim.boot() if fault == "killed" else victim.go_on()
    everyone_goes_on(run)
    assert victim.core.place.slot == slot, "its old slot"
    last = records(others[0], Round)[-1]
    assert slot in [c.slot for c in last.contributions]


def test_two_machines_survive_the_junior_and_never_split() -> None:
    run = together(2)
    senior, junior = run.machines
    assert (senior.core.place.slot, junior.core.place.slot) == (0, 1)
    run.group = {junior.address: 1}
    before = run.rounds
    run.run_until(lambda: senior.ledger.log.rounds > before + 3, 60)
    assert junior.ledger.log.rounds <= before + 1
    run.group = {}
    everyone_goes_on(run)
    senior.kill()
    at = junior.ledger.committed
    run.run_for(60)
    assert junior.ledger.committed <= at + 1, "the junior alone is no quorum"
    senior.boot()
    everyone_goes_on(run)


def test_a_slow_machine_is_given_up_at_the_deadline_and_asked_for_fewer_samples() -> None:
    run = Simulation(0, wait_for=3, deadline_s=2.0)
    for work_s in (0.2, 0.2, 3.0):
        run.add(work_s, samples=8)
    slow = run.machines[2]
    run.run_until(lambda: slow.core.place.member is not None and slow.core.place.member.samples == 2, 300)
    rounds = records(run.machines[0], Round)
    assert any(len(r.contributions) == 2 for r in rounds)
    run.check_models()


def test_a_leader_whose_evaluation_is_too_slow_hands_over() -> None:
    run = Simulation(0, wait_for=3, deadline_s=2.0)
    for work_s in (60.0, 0.2, 0.2):
        run.add(work_s)
    slow = run.machines[0]
    run.run_until(lambda: run.rounds >= 20, 200)
    assert run.now < 60 + 60, "the others have not waited for each of its evaluations"
    assert not slow.core.leads
    run.check_models()


def test_a_machine_that_stays_away_loses_its_place_and_gets_it_back() -> None:
    run = together(3)
    victim = run.machines[1]
    slot = victim.core.place.slot
    victim.kill()
    run.run_until(lambda: slot not in [r.slot for r in leader(run).ledger.roster.members], 120)
    victim.boot()
    everyone_goes_on(run)
    assert victim.core.place.slot == slot
    assert len({r.slot for r in leader(run).ledger.roster.members}) == 3


@pytest.mark.parametrize("lost", ["disk", "log"])
def test_a_machine_that_lost_its_disk_comes_back_as_another(lost: str) -> None:
    run = together(3)
    victim = run.machines[1]
    slot = victim.core.place.slot
    promise = victim.disk.promise
    victim.kill(lose_disk=True)
    if lost == "log":
        victim.disk.promise = promise
    victim.boot()
    everyone_goes_on(run)
    assert victim.core.place.slot == 3
    assert sorted(r.slot for r in leader(run).ledger.roster.members) == sorted({0, 1, 2, 3} - {slot})


def test_newcomers_join_while_others_fail_and_the_donor_dies() -> None:
    run = together(3)
    newcomer = run.add(contacts=(1,))
    run.run_until(lambda: len(newcomer.ledger.log) > 0, 20)
    assert newcomer.core.place.member is None or len(newcomer.ledger.log) < len(run.machines[0].ledger.log)
    donor = leader(run)
    donor.kill()
    run.tell_lost(donor.address)
    everyone_goes_on(run)
    donor.boot()
    everyone_goes_on(run)
    assert sorted(r.slot for r in leader(run).ledger.roster.members) == [0, 1, 2, 3]


def test_a_newcomer_does_not_make_a_minority_a_quorum() -> None:
    """The leader and a newcomer are half of the new roster, with the senior; the two others a quorum of the old one."""
    came_in_time = 0
    for moment in range(12):
        run = together(3, seed=moment)
        newcomer = run.add()
        run.run_until(lambda: newcomer.core.place.slot == 3, 20)  # noqa: B023
        run.run_for(0.06 * moment)
        run.group = {newcomer.address: 1, leader(run).address: 1}
        run.run_for(20)
        came_in_time += newcomer.core.place.member is not None
        run.group = {}
        everyone_goes_on(run)
    assert came_in_time > 0, "every cut came before the new roster was proposed"


def test_a_machine_that_flaps_disturbs_nobody() -> None:
    run = together(3)
    boss = leader(run)
    flapping = next(m for m in run.machines if m is not boss)
    before = boss.ledger.log.rounds
    for _ in range(12):
        flapping.stopped = True
        run.run_for(3)
        flapping.go_on()
        run.run_for(1)
    assert leader(run) is boss
    assert boss.core.election.won == 1
    assert boss.ledger.log.rounds > before + 30
    everyone_goes_on(run)


def test_a_killed_leader_is_replaced_within_moments() -> None:
    took_s = []
    for seed in range(8):
        run = together(4, seed=seed)
        victim = leader(run)
        others = [m for m in run.machines if m is not victim]
        victim.kill()
        run.tell_lost(victim.address)
        began, before = run.now, max(m.ledger.log.rounds for m in others)
        run.run_until(lambda: all(m.ledger.log.rounds > before + 1 for m in others), 30)  # noqa: B023
        took_s.append(run.now - began)
    assert sorted(took_s)[4] < 2.0, "without waiting for suspicion_s: an election, and two rounds of 0.3 s"


def test_everybody_dies_and_the_run_goes_on() -> None:
    run = together(3)
    before = run.rounds
    for machine in run.machines:
        machine.kill()
    run.run_for(5)
    for machine in run.machines:
        machine.boot()
    everyone_goes_on(run)
    assert run.rounds >= before


def test_leaving_takes_effect_and_the_last_one_ends_alone() -> None:
    run = together(3)
    order = [leader(run), *[m for m in run.machines if not m.core.leads]]
    for machine in order:
        machine.do(lambda machine=machine: machine.core.leave(run.now))
        run.run_until(lambda machine=machine: machine.core.left, 30)
    assert [len(machine.ledger.roster.members) for machine in order] == [2, 1, 1]
    run.check_models()
    order[2].kill()
    order[2].boot()
    order[0].kill()
    order[0].boot()
    run.run_until(lambda: run.rounds > 20, 60)
    assert [r.slot for r in order[2].ledger.roster.members] == sorted(
        [order[0].core.place.slot, order[2].core.place.slot]
    )


def test_a_flipped_bit_is_found_at_the_snapshot_and_the_weights_are_made_anew() -> None:
    run = together(3)
    for victim in (leader(run), next(m for m in run.machines if not m.core.leads)):
        victim.model.fault = b"a bit"
        everyone_goes_on(run, 2 * SNAPSHOT_EVERY)
        assert victim.model.fault == b""
        assert victim.core.failure is None


def test_machines_that_agree_on_nothing_stop() -> None:
    class Stubborn(Numbers):
        def rebuild(self) -> None:
            self.records = []

    run = together(2)
    run.add()
    everyone_goes_on(run)
    for number, machine in enumerate(run.machines):
        machine.model.__class__ = Stubborn
        machine.model.fault = bytes([number])
    run.run_until(lambda: any(m.core.failure for m in run.machines), 100)
    assert isinstance(next(m.core.failure for m in run.machines if m.core.failure), ModelMismatchError)


def test_another_base_model_is_refused_before_it_does_harm() -> None:
    run = together(2)
    other = run.add()
    other.kill()
    other.boot(fault=b"another base")
    assert "start from the model that the run started from" in str(other.failure)
    run.run_for(10)
    assert len(leader(run).ledger.roster.members) == 2


def test_two_founders_do_not_mix() -> None:
    run = together(2)
    second = Simulation(5)
    second.add(samples=1)
    second.run_until(lambda: second.rounds > 3, 30)
    stranger, joining = second.machines[0], run.add()
    joining.kill()
    joining.disk.log.extend_raw(stranger.ledger.log.raw(0))
    joining.disk.promise = Promise(term=1, log_term=1, slot=0, vote=0)
    joining.name = "stranger"
    run.check = lambda machine: None  # type: ignore[method-assign]  # which would find the two histories itself
    joining.boot()
    run.run_until(lambda: joining.core.failure is not None, 60)
    assert isinstance(joining.core.failure, HistoryError)


def test_a_name_in_use_is_refused() -> None:
    run = together(2)
    double = run.add()
    double.name = run.machines[1].name
    double.boot()
    run.run_until(lambda: double.core.failure is not None, 30)
    assert isinstance(double.core.failure, RefusedError)
    assert "another machine is called 'm1'" in str(double.core.failure)


def test_stale_and_foreign_frames_count_for_nothing() -> None:
    run = together(2)
    boss = leader(run)
    member = next(m for m in run.machines if m is not boss)
    log, epoch = boss.ledger.log, boss.ledger.roster.epoch
    good = {"secret": b"", "term": boss.core.place.promise.term, "chain": log.chain(len(log))}
    bad = [
        {**good, "secret": b"guess"},
        {**good, "term": good["term"] + 1},
        {**good, "chain": log.chain(len(log) - 1)},
    ]
    run.group = {member.address: 1}
    taken = boss.core._leader
    assert taken is not None
    for keys in bad:
        frame = pack_frame(RUN, log.rounds, epoch, member.core.place.slot, b"abc", **keys)
        boss.core.receive(member.address, parse_frame(frame, RUN), run.now)
        assert member.core.place.slot not in taken._codes
    for fields in [
        (log.rounds, epoch + 1, 3),
        (log.rounds + 1, epoch, 3),
        (log.rounds - 1, epoch, 3),
        (log.rounds, epoch, 4),
    ]:
        frame = pack_frame(RUN, fields[0], fields[1], member.core.place.slot, bytes(fields[2]), **good)
        boss.core.receive(member.address, parse_frame(frame, RUN), run.now)
        assert member.core.place.slot not in taken._codes
    frame = pack_frame(RUN, log.rounds, epoch, member.core.place.slot, b"abc", **good)
    boss.core.receive("elsewhere:1", parse_frame(frame, RUN), run.now)
    assert member.core.place.slot not in taken._codes
    boss.core.receive(member.address, parse_frame(frame, RUN), run.now)
    assert taken._codes.get(member.core.place.slot) == b"abc" or log.rounds > parse_frame(frame, RUN).round
