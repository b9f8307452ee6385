"""Low-bit kernels: tensors in, tensors out.

A docstring only, for ever: transformers probes a PyPI package of this name and reads its version.
"""
