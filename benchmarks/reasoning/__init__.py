"""Published reasoning benchmarks: problems in, pass@1 out."""
