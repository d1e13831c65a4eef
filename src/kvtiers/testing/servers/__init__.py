"""Real engines of the remote tier, started from packages on the loopback for tests: one file an engine, each a `RemoteEngine`."""
