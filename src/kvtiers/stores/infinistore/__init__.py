"""Records in an InfiniStore server, over its TCP protocol and by a client of our own. RDMA is not spoken.

`values.py` is the adapter, `channel.py` its sockets with a deadline, `frames.py` what goes over them.
"""
