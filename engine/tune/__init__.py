"""Several runs from one command: grids, searches, and what they found."""
