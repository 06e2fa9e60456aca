"""From text to better integers: GPTQ, distillation, and the search for sensitive layers."""
