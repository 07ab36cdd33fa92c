"""A sub-command a file: parse, measure, show. ``benchmarks.__main__`` gathers them."""
