"""Steering files of other tools, read into profiles and written. What is exact and what is not: docs/interchange.md."""
