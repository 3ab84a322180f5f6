"""How values travel: gradients of one hop, weights that are gathered, weights that have changed."""
