"""Compressors, error feedback, compressed collectives, and the hooks by which they enter DDP and FSDP2."""
