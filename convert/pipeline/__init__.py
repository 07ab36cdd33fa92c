"""Tie the rooms together: from a source to a finished folder."""
