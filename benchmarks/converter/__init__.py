"""Time and memory of conversions beside mlx-lm."""
