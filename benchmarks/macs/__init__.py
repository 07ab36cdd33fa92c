"""Predictions for Macs and their check."""
