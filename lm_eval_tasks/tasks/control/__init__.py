"""What steering must not cost: reading comprehension, answering harmless requests, fluent text."""
