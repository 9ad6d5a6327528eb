"""Where ranks, layers and micro-batches go: plain arithmetic, no process group."""
