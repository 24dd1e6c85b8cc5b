"""One module per policy or world-model family: how its goldens are recognised and recomputed (see benchmarks/parity.py)."""
