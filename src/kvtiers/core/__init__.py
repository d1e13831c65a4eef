"""Who is where: index, slots, tiers, leases, sessions and policies, without I/O, threads or a clock of its own.

Calls and completions go in, intents come out: threads drive it in the cache, a list of faults in the oracle, a trace in a replay.
"""
