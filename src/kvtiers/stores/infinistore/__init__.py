"""Records in an InfiniStore server, over its TCP protocol and by a client of our own; on hosts that ask for it, pieces by RDMA.

`values.py` is the adapter, `channel.py` its sockets with a deadline, `frames.py` what goes over them. `rdma.py` is for hosts with an RDMA device.
"""
