"""What a forward pass does: read with torch.fx, or off a run."""
