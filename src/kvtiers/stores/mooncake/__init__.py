"""Records in a Mooncake Store: memory (and SSDs) of many nodes behind one master, over TCP or RDMA.

`values.py` is the adapter; it reaches the client through `session.py` and hands it only memory from `registered.py` or the arena.
"""
