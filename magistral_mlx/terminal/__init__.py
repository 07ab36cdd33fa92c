"""Command-line options and what a terminal shows."""
