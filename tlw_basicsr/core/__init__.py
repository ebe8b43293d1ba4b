"""The method: needs torch alone, and nothing else of this package."""
