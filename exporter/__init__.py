"""MobileLLM-R1 on phones: one quantized checkpoint, the same integers in every format."""
