"""HTTP endpoints for the operator's profiles."""
