"""Train the embedded model. Not in the wheel."""
