"""The sides of a benchmark: synapse, plain hooks, and the peers."""
