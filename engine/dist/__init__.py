"""Process groups, collectives that autograd understands, and local ranks."""
