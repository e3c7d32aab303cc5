"""Look inside a Transformer classifier."""
