"""Executes what the core intends: I/O pools, the offload engine, and the two things users hold, `CacheNode` and `TieredCache`."""
