"""Checkpoints on disk and on the hub: files, headers, config and manifest."""
