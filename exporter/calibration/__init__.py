"""Calibration: GPTQ, distillation, and the sensitivity search, on calibration text."""
