"""The command line, over `jpaged`."""
