"""Training: of the embedded model, out of the wheel."""
