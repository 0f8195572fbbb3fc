"""The operators on a GPU: are they right, are they right in a CUDA graph, and what do they cost. See `check.py`."""
