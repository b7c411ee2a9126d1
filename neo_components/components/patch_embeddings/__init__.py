"""Patch embeddings, one to a file; each registers itself under the name that recipes use."""
