"""Networks: the weighting network."""
