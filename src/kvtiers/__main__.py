"""`python -m kvtiers` is `kvtiers`."""

from __future__ import annotations

from kvtiers.cli.app import main

if __name__ == "__main__":
    main()
