"""Pure arithmetic on tensors and arrays; nothing here knows of modules or files."""
