"""Losses: TLW and the distances it uses."""
