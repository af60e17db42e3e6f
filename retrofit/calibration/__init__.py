"""Data through a model: the moments at each site, and how sure they are."""
