"""A conversation at the prompt: its commands, its settings and its costs."""
