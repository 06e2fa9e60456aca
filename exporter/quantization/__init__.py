"""Quantization: schemes, rounding of weights to codes, and the quantized checkpoint on disk."""
