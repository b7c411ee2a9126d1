"""What a model and a stage cost before they run: FLOPs, kept activations, memory by kind. Pure functions, no weights."""
