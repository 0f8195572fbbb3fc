"""Find the experts that go with a behaviour: count what the router selects on contrastive pairs."""
