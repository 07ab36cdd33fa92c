"""The worker thread that owns MLX, and the event queues of its hosts."""
