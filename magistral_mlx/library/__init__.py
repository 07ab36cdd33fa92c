"""The models on this machine, their folders, and the user's settings."""
