"""What happens to KV on disk when things go wrong: kvtiers and LMCache side by side, each really run.

    python -m benchmarks.peers.faults [--json FILE] [--only SCENARIO]        from the checkout; under five minutes

Every cache is a process with its own empty directory; the damage is done from outside, and a cell says what was seen. For the full
disk the process gets a small file system of its own (`unshare`, tmpfs): no privilege is needed where user namespaces are allowed;
elsewhere the cell says that it was not run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.peers.fault_scenarios import SCENARIOS, Observation, Scenario
from benchmarks.peers.fault_subject import Subject, subjects
from benchmarks.peers.lmcache import available
from rich.console import Console
from rich.table import Table

from kvtiers.model.errors import KvtiersError

_AT_ONCE = 2


def observe(scenario: Scenario, subject: Subject, directory: Path) -> Observation:
    """What was seen, or why it could not be: a peer that hangs or dies is an observation too."""
    try:
        return scenario(subject, directory)
    except (KvtiersError, OSError) as error:
        return Observation(f"not completed: {error}", {"completed": False})


def observe_all(
    names: list[str], taking_part: list[Subject], below: Path
) -> dict[str, dict[str, Observation]]:
    """By scenario and cache. Nothing here is a figure of time, so two are run at once."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        running = {
            name: {
                subject.name: pool.submit(
                    observe, SCENARIOS[name], subject, below / f"{name} {number}".replace(" ", "-")
                )
                for number, subject in enumerate(taking_part)
            }
            for name in names
        }
        seen: dict[str, dict[str, Observation]] = {}
        for name, row in running.items():
            print(f"{name} …", file=sys.stderr)
            seen[name] = {subject: one.result() for subject, one in row.items()}
    return seen


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write what was seen here")
    parser.add_argument("--only", choices=SCENARIOS, help="one scenario")
    parser.add_argument(
        "--directory", type=Path, help="where to make the directories (default: for temporary files)"
    )
    arguments = parser.parse_args()
    missing = available()
    taking_part = [one for one in subjects() if not (missing and one.variant)]
    if missing:
        print(f"without LMCache: {missing}", file=sys.stderr)
    began = time.monotonic()
    names = [name for name in SCENARIOS if arguments.only in {None, name}]
    with tempfile.TemporaryDirectory(prefix="kvtiers-faults-", dir=arguments.directory) as below:
        seen = observe_all(names, taking_part, Path(below))
    Console().print(table(seen, [subject.name for subject in taking_part]))
    print(f"{time.monotonic() - began:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(report(seen), indent=1) + "\n")


def table(seen: dict[str, dict[str, Observation]], names: list[str]) -> Table:
    """A row for each fault, a column for each cache; red where wrong bytes were served."""
    result = Table("", *names, show_lines=True)
    for scenario, row in seen.items():
        cells = (row[name] for name in names)
        result.add_row(
            scenario, *(f"[red]{one.text}[/]" if one.facts.get("wrong_chunks") else one.text for one in cells)
        )
    return result


def report(seen: dict[str, dict[str, Observation]]) -> dict[str, Any]:
    """The same for a program."""
    return {
        "kernel": platform.release(),
        "seen": {
            scenario: {name: dataclasses.asdict(one) for name, one in row.items()}
            for scenario, row in seen.items()
        },
    }


if __name__ == "__main__":
    main()
