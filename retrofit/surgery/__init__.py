"""Modules put into a model and taken out again, in either layout; folding."""
