"""Measurements of the project's claims; ``python -m benchmarks`` runs them."""
