"""Plain torch implementations: the oracle of every test and the baseline of every benchmark."""
