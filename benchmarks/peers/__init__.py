"""Other systems that train over slow links, on the same model, data and emulated hosts as thinwire."""
