"""Trainable Loss Weights for any training loop: needs torch, and nothing else of this package."""
