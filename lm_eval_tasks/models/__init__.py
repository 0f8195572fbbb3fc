"""The models of lm-eval that steer: an engine in this process, or a server."""
