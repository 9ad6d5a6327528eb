"""From sources to cache entries: parallel, restartable, one builder at a time."""
