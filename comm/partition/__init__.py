"""Hierarchical ZeRO: parameters, gradients and optimizer state each sharded over a level of their own, on FSDP2."""
