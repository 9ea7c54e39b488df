"""Training: the LightningModule, callbacks, checkpoints and resuming."""
