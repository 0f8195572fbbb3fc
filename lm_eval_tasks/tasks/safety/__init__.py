"""The paper's four sets of harmful requests. None of their text is in this package."""
