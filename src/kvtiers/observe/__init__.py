"""What an operator sees of a running cache: its metrics. Reads `stats()` alone, so it can't be in the way of anything."""
