"""The command line: `kvtiers`, also installed as `lmcache-cli`. One file a command, `NAME_cmd.py`, found by its name.

A command's module imports what is heavy (torch, pydantic, the runtime) inside its functions: `--help` imports all of them.
"""
