"""Errors, kinds of options, files and signals: the standard library and ``torch.load``."""
