"""Training on the local machine: documents → infilling transform → packed batches → steps → checkpoints."""
