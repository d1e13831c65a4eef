"""Engines that use the cache, one file or folder each. Only here, in `memory/cuda.py` and in the demo is torch imported."""
