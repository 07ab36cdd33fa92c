"""Divergence of quantized checkpoints from their source."""
