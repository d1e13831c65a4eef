"""Conformance kits: what a store, a policy or a codec of yours must pass to be one of ours. They need pytest."""
