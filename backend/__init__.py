"""Models, number formats, quantization methods and metrics."""
