"""Tasks for steermoe-lab: for each behaviour one that shows it and one that steering must not move."""
