"""Logits to ids: sampling, decoding, speculation, budgets and the reply."""
