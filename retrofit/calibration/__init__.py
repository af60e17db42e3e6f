"""Data through a model: the moments at each site, how sure they are; running statistics anew."""
