"""Where BatchNorms go, and why."""
