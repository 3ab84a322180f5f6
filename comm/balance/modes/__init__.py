"""The modes of the balancing loss, one per file."""
