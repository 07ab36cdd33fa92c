"""One question on a command line: where its text comes from, and its results."""
