"""What ``tlw train`` and ``tlw test`` are."""
