"""What a model and a stage cost, told before they run: FLOPs, kept activations, memory by kind. No weights needed."""
