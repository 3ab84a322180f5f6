"""Random lives of a simulated run: machines crash, stop, lose messages and disks, come and go, and agree on all."""

from __future__ import annotations

from onebyte_simulation import Machine, Simulation, everyone_goes_on

from thinwire.comm.onebyte.membership.quorum import is_quorum

SCHEDULES = 25


def may_lose_disk(run: Simulation, victim: Machine) -> bool:
    """Whether the others could go on without what the victim had promised."""
    rosters = [roster for m in run.machines if len(m.disk.log) for roster in m.ledger.rosters_in_force]
    rest = [{r.slot for r in roster.members if r.name != victim.name} for roster in rosters]
    return all(len(slots) == len(r.members) or is_quorum(slots, r) for slots, r in zip(rest, rosters, strict=True))


def live(seed: int) -> Simulation:
    """A random life of a run; in the end everything is repaired."""
    run = Simulation(seed)
    chance = run.chance
    for number in range(chance.randint(2, 5)):
        work_s = chance.choice([0.1, 0.3, 1.0, 7.0]) if number else 0.3
        run.add(work_s, contacts=[chance.randrange(max(1, number))], samples=chance.randint(1, 4))
    run.run_for(chance.uniform(0, 8))
    run.loss, run.twice = chance.choice([0.0, 0.02, 0.2]), chance.choice([0.0, 0.1])
    disk_lost = False
    for _ in range(chance.randint(3, 25)):
        victim = chance.choice(run.machines)
        fault = chance.choice(["kill", "leader", "stop", "cut", "join", "disk", "boot", "continue", "heal"])
        if fault == "leader":
            victim = next((m for m in run.machines if m.alive and m.core.leads), victim)
        if fault in ("kill", "leader") and victim.alive:
            victim.kill()
            if chance.random() < 0.5:
                run.tell_lost(victim.address)
        elif fault == "stop" and victim.alive:
            victim.stopped = True
        elif fault == "continue" and victim.alive:
            victim.go_on()
        elif fault == "boot" and not victim.alive:
            victim.boot()
        elif fault == "cut":
            run.group = {m.address: chance.randint(0, 1) for m in run.machines}
        elif fault == "heal":
            run.group = {}
        elif fault == "join" and len(run.machines) < 7:
            run.add(chance.choice([0.1, 1.0]), contacts=[chance.randrange(len(run.machines))], samples=2)
        elif fault == "disk" and not disk_lost and victim is not run.machines[0] and may_lose_disk(run, victim):
            disk_lost = True
            victim.kill(lose_disk=True)
        run.run_for(chance.choice([0.05, 0.2, 0.5, 0.5, 3, 8]))
    run.loss = run.twice = 0.0
    run.group = {}
    for machine in run.machines:
        if not machine.alive:
            machine.boot()
        elif machine.stopped:
            machine.go_on()
    everyone_goes_on(run, 4, 300)
    return run


def test_random_lives_end_with_one_history_and_all_machines_in_it() -> None:
    """Also checked at every step: no two machines ever commit different records, and none is applied twice or lost."""
    undone = elections = 0
    for seed in range(SCHEDULES):
        run = live(seed)
        undone += sum(m.ledger.undone for m in run.machines)
        elections += sum(m.core.election.won for m in run.machines)
        for machine in run.machines:
            machine.disk.log.close()
    assert undone > 0, "no schedule has superseded a round: they are too tame"
    assert elections > SCHEDULES
