"""Have a language model judge answers."""
