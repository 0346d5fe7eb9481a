"""The arithmetic, op by op: arrays in, arrays out. Each file holds the op's `reference` and its dispatch."""
