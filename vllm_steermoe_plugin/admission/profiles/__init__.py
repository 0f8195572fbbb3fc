"""Profiles that an operator loads under a name."""
