"""Convert a source into a finished folder."""
