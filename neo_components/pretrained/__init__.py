"""Pre-Buffer assets: made by one command, and added to those that ship."""
