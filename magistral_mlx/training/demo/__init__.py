"""What trains the embedded model: its problems, its phrases and its training loop."""
