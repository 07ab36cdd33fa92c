"""What the project claims, measured: ``python -m benchmarks``. The packages never import this."""
