"""Semi-synchronous training: local optimizer steps, and now and then an outer step on what all ranks have changed."""
