"""Hugging Face causal language models: families, loading, statistics, checkpoints."""
