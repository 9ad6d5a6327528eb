"""What a run shows and records: log lines, metrics, progress, throughput, plots, the run folder."""
