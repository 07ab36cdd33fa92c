"""The embedded model: a real checkpoint of a few megabytes, and what made it."""
