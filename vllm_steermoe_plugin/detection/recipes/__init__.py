"""Pairs for known behaviours, made from data sets."""
