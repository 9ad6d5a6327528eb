"""What a configuration costs, computed without building the model."""
