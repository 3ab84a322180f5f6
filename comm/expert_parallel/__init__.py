"""Expert parallelism: each rank of a group holds some of the experts, and tokens travel to them."""
