"""Weights, where they come from, and models by name."""
