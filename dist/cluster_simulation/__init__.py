"""A run on a described cluster in virtual time, with slow ranks, jitter and failures: up to tens of thousands."""
