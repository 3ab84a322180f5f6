"""One file per compressor: its settings, and the encoding and decoding of one tensor."""
