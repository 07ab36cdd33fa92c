"""Choose the bits of every matrix and the layout of the output files."""
