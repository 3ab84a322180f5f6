"""Gossip: each machine trains for itself and averages its weights with a few neighbours, with no global collective.

How it fits together. A machine's part of a method is a *script*: a generator that sends and takes messages through a
Port and yields where it has to wait. It knows neither threads nor clocks nor sockets, so the same code trains over TCP
(post/) and in a simulation of hundreds of machines in one process (simulation.py), and gives the same bits in both.

    schedule.py   says, for each step, whether to talk, with what Mixing, and when to merge: a Turn
    graphs/       who talks to whom in which round, with which weights
    mixer.py      one round among neighbours that preserves the mean through lateness and loss
    algorithms/   what is done with that: D-PSGD, push-sum, gradient tracking, ...
    merge.py      the global average, exact among those that are alive; barrier.py, how they agree on who that is
    agent.py      schedule, algorithm and merge of one machine, step by step
    begin.py      how machines without a launcher begin; join.py, how one enters a run under way
    build.py      all of that from settings
    door.py       how it enters a trainer; handle.py, what the trainer then holds; machine.py, the model
"""
