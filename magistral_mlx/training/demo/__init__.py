"""Train the embedded model: its problems, phrases and training loop."""
