"""Read published weights: shards, one consolidated file, or the hub."""
