"""Compare an artifact with the quantized checkpoint: files, codes and scales, logits."""
