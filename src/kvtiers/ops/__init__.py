"""What an operator runs: the demo now, and other jobs around a cache. Nothing below the edge imports from here."""
