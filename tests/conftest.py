"""For all tests: no test asserts a time, hypothesis' deadline of 200 ms for an example included."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("hypothesis") is not None:  # not in .venv-vllm, whose tests don't use it
    from hypothesis import settings

    settings.register_profile("kvtiers", deadline=None)
    settings.load_profile("kvtiers")
