"""Costs beside peers: ``python -m benchmarks``."""
