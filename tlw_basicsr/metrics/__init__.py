"""Metrics: those of the paper's tables, for BasicSR's validation and as functions of tensors."""
