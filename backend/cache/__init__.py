"""Key-value caches that keep rounded keys and values, on transformers' Cache API."""
