"""Estimates of what a stage costs before it runs: FLOPs, kept activations, memory by kind. No weights needed."""
