"""Modules that take the position of others in an exported folder, where transformers loads and saves."""
