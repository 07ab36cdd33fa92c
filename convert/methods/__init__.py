"""Quantize: weighted search, GPTQ, and the choice of bits."""
