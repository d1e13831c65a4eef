"""The HTTP side of a running cache: metrics, health, and the calls an operator makes. Knows the cache by `operated.Operated` only."""
