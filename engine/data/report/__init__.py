"""What `python -m engine.data inspect`, `verify` and `split` find out."""
