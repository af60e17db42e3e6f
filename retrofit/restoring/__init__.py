"""A folded network brought back into its own class, whose BatchNorms learn again."""
