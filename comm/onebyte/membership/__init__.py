"""Machines that come and go, and commit rounds together: a replicated log whose records are rounds.

How it works. One member leads. It collects the contributions of a round until all whom it expects have answered, or
the deadline has passed; then it proposes the round as the next record of the log. Members append it, carry it out at
once, and evaluate the next round. Their contribution to that is keyed with the chain hash of their log, and so is also
their acknowledgement of the record: a round costs one round trip. A record is committed once a quorum holds it
(quorum.py). What is not may yet be superseded; its round is then undone exactly, which the weights allow. Rounds before
a snapshot cannot be undone, and are carried out only when they are committed.

Why no two machines commit different rounds. This is Raft (Ongaro and Ousterhout 2014) with the term of the whole log in
place of a term in each record, as in Viewstamped Replication (Liskov and Cowling 2012):

1. A machine has one vote in a term, and does not forget whom it gave it, nor the newest term (promise.py). Two quorums
   of a roster share a machine. So a term has at most one leader.
2. log_term is the newest term whose leader's log this machine has taken over whole: at least all that it held when it
   was elected. It sends contributions and votes only under its newest term; acknowledgements count only from
   machines whose log_term is the leader's term. Of all logs with one log_term, each is the beginning of a longer one.
3. A vote goes only to a machine whose (log_term, length) is not less than the voter's. A committed record is held by a
   quorum with that log_term or a newer one; every later leader has a vote of one of them, hence holds the record.
4. Records follow one another by their chain hash, so whoever holds a record holds the same ones before it. A leader
   proposes a record only when all before it are committed: of any log at most the last record is not.
5. A new roster takes effect when it is appended. Until it is committed, quorums of the old and of the new one are
   needed, for commits and elections alike. Whoever still knows only the old one needs a quorum of the old one, of which
   the holders of a committed new one are a part.
6. A slot speaks only through the machine that kept its promise file and its log. One that lost either comes back as a
   new machine in a new slot, and takes the place of the old one.

What it needs to go on: a quorum of the roster that reach each other. What it does not withstand: machines that lie (the
secret keeps strangers out, and a wrong contribution is one of many, see `robust`), and half of the machines losing
their disks.

core.py decides, without sockets, threads or clocks; place.py, election.py, work.py, leader.py and admission.py are its
parts, ledger.py is the log. connections.py moves messages over TCP; steps.py and elastic.py are what the optimizer
sees, door.py how it gets there.
"""
