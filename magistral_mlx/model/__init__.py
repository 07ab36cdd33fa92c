"""The transformer, its caches, and the memory that both need."""
