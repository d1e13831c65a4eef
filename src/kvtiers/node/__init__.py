"""One cache process per node: what engines and the service say to each other, the client, the service.

`client` needs numpy and msgspec only; whatever needs the runtime is in `service`, `server`, `connection` and `requests`.
"""
