"""How steermoe-lab was made; torch only."""
