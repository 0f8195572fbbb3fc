"""Compare runs of the same documents: pair them, test the differences, report."""
