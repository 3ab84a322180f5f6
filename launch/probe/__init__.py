"""`thinwire probe`: what links, collectives, compressors and processors of a job can do, before it trains."""
