"""How a model is called, copied, and put in a mode for a while."""
