"""The programs behind ``tlw``, one a module: ``main(argv)`` reads the arguments and calls the package."""
