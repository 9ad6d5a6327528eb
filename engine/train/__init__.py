"""Training: one command from overrides to a trained model."""
