"""Studies: questions asked of the engine by running it."""
