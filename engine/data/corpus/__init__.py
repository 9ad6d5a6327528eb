"""Sources: which files they mean, how they are cut into units of work, and the documents in them."""
