"""Balance: the load-balancing loss of mixtures of experts, over the global batch, by one small message."""
