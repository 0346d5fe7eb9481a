"""Training on the device: documents → infilling transform → packed rows → steps → checkpoints."""
