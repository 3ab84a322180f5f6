"""Shared-randomness SPSA: machines exchange one byte per gradient and stay equal bit for bit."""
