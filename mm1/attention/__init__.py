"""SparQ attention: the algorithm (sparq.py), its cache (cache.py), transformers' door to both (register.py)."""
