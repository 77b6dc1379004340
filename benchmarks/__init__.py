"""Time and memory of packext beside its peers: ``python -m benchmarks``."""
