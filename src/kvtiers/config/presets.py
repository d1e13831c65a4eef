"""Four configurations to start from, one for each way a cache is used, as commented YAML.

`scaled` fits a pattern to a machine: a share of its memory and of its free disk, never more than the pattern is described with.
`described` writes the sizes of the description, which want a large machine. Pure given a `Machine`; `machine_for_preset` probes one.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Final, NamedTuple

from kvtiers.config.fit import AUTO_CPU_LEAST, fit, memory_limit
from kvtiers.config.machine import Machine
from kvtiers.config.schema import CacheConfig
from kvtiers.config.sizes import GIB, MIB, TIB, format_exact, format_size
from kvtiers.model.errors import DoesNotFit

DISK_PATHS: Final = ("/var/cache/lmcache", "~/.cache/kvtiers")
"""Where the disk tier goes if nobody says: the first of them that can be used."""

_MIN_FREE_SPACE: Final = GIB  # the default of storage.disk.min_free_space
_LEAST_DISK: Final = 64 * MIB
_WIDTH: Final = 110


class Portion(NamedTuple):
    """`described` bytes, or `share` of what a smaller machine has; `why` both."""

    described: int
    share: Fraction
    why: str


class Remote(NamedTuple):
    """What the pattern shares KV through, and what the operator has to fill in."""

    backend: str
    endpoint: str
    what: str
    address: str
    more: tuple[str, ...] = ()
    """Further lines of its section."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """One way to use a cache."""

    purpose: str
    cpu: Portion
    disk: Portion | None
    without_disk: str = ""
    compression: str = "none"
    gpu: int | None = None
    """Bytes of GPU memory it is described with; None: a share of whatever there is."""
    remote: Remote | None = None


PATTERNS: Final[Mapping[str, Pattern]] = {
    "aggressive": Pattern(
        purpose="short conversations, many at a time: as much host memory as there is, no disk",
        cpu=Portion(200 * GIB, Fraction(1, 2), "Everything that is kept lies here, so it is large."),
        disk=None,
        without_disk="Off: what is asked for again is asked for soon, and memory has it. Switch it on, with a path, "
        "to keep KV over restarts.",
    ),
    "long-document": Pattern(
        purpose="RAG and questions about long documents: a large, compressed disk tier",
        cpu=Portion(200 * GIB, Fraction(1, 2), "The documents in use now; the others wait on disk."),
        disk=Portion(5 * TIB, Fraction(1, 2), "Every document that may be asked about again."),
        compression="zstd",
        gpu=80 * GIB,
    ),
    "shared": Pattern(
        purpose="several instances that share KV through a remote store",
        cpu=Portion(
            100 * GIB, Fraction(1, 4), "Other instances keep the rest, so it need not hold everything."
        ),
        disk=Portion(TIB, Fraction(1, 4), "What this node uses often, so that it is not fetched twice."),
        gpu=80 * GIB,
        remote=Remote(
            "mooncake",
            "mooncache.cluster.local:8080",
            "Mooncake P2P",
            "Yours, as host:port.",
            (
                "    p2p: true  # this node lends its peers memory, and reads from theirs",
                '    segment_size: "4Gi"  # how much, beside cpu.buffer_size',
            ),
        ),
    ),
    "cost-first": Pattern(
        purpose="little memory, much disk, the rest in an object store",
        cpu=Portion(50 * GIB, Fraction(1, 8), "Small: memory is what costs most."),
        disk=Portion(10 * TIB, Fraction(3, 4), "Large: the cheapest place that is still local."),
        compression="zstd",
        gpu=40 * GIB,
        remote=Remote("s3", "s3://your-bucket", "S3", "Your bucket; the pattern names none."),
    ),
}
"""By name. The sizes are those of the description, the shares keep their order on a small machine."""


class _Sizes(NamedTuple):
    cpu: int
    cpu_note: str
    disk: int
    disk_note: str
    disk_path: str
    pool: bool
    """Whether the GPU pool is written, or only shown."""
    heading: str


def machine_for_preset(name: str, path: str | None = None) -> Machine:
    """This machine, with one path for the disk tier if the pattern has one. KeyError for an unknown name."""
    if PATTERNS[name].disk is None:
        return Machine.probe()
    found = [Machine.probe([candidate]) for candidate in ((path,) if path else DISK_PATHS)]
    return next((machine for machine in found if not machine.paths[0].problem), found[0])


def scaled(name: str, machine: Machine) -> str:
    """YAML that fits `machine`, the same each time for the same sizes. Raises DoesNotFit: it is too small, or the path can't be used."""
    pattern = PATTERNS[name]
    problems: list[str] = []
    cpu = _scaled_cpu(pattern.cpu, machine, problems)
    disk = _scaled_disk(pattern.disk, machine, problems) if pattern.disk else 0
    if problems:
        raise DoesNotFit(problems, source=f"the preset {name} does not fit this machine")
    free = f", {format_size(_room(machine))} of disk for the cache" if pattern.disk else ""
    text = _write(
        name,
        _Sizes(
            cpu=cpu,
            cpu_note=_scale_note(pattern.cpu, "this machine's memory", cpu),
            disk=disk,
            disk_note=_scale_note(pattern.disk, "what is free there", disk) if pattern.disk else "",
            disk_path=str(machine.paths[0].path) if pattern.disk else "",
            pool=False,
            heading=f"Sizes are scaled to the machine it was written on: {format_size(machine.memory_total)} of memory{free}.",
        ),
    )
    fit(CacheConfig.from_text(text, name=f"preset {name}", environ={}), machine)
    return text


def described(name: str, path: str | None = None) -> str:
    """YAML with the sizes of the description: valid everywhere, for machines that have so much."""
    pattern = PATTERNS[name]
    return _write(
        name,
        _Sizes(
            cpu=pattern.cpu.described,
            cpu_note="Make it smaller on a smaller machine.",
            disk=pattern.disk.described if pattern.disk else 0,
            disk_note="Make it smaller on a smaller disk.",
            disk_path=str(Path(path).expanduser().absolute()) if path else DISK_PATHS[0],
            pool=True,
            heading="Sizes are those the pattern is described with, and want a large machine; without --as-described they are scaled to "
            "the machine at hand.",
        ),
    )


def _scaled_cpu(tier: Portion, machine: Machine, problems: list[str]) -> int:
    """Of the total, so that it is the same each time; of what is available, where that is less: it must also fit later."""
    nbytes = _rounded(min(int(machine.memory_total * tier.share), memory_limit(machine) * 3 // 4))
    if nbytes < AUTO_CPU_LEAST:
        problems.append(
            f"storage.cpu.buffer_size: {format_size(machine.memory_available)} of memory are available "
            f"(bound by {machine.memory_bound_by}), too little for the smallest arena, {format_size(AUTO_CPU_LEAST)}; free memory"
        )
    return min(tier.described, nbytes)


def _scaled_disk(tier: Portion, machine: Machine, problems: list[str]) -> int:
    (space,) = machine.paths
    if space.problem:
        problems.append(f"storage.disk.path: {space.path} {space.problem}; choose another with --path")
        return 0
    room = _room(machine)
    nbytes = _rounded(int((room - _MIN_FREE_SPACE) * tier.share))
    if nbytes < _LEAST_DISK:
        problems.append(
            f"storage.disk.max_size: {format_size(room)} are free in {space.path}, of which {format_size(_MIN_FREE_SPACE)} stay free; "
            "free space there, or choose another directory with --path"
        )
    return min(tier.described, nbytes)


def _room(machine: Machine) -> int:
    """What the cache may have: free, or its own already."""
    (space,) = machine.paths
    return space.free + space.own


def _rounded(nbytes: int) -> int:
    """Down to four binary digits, whole MiB: easy to read, and small changes of what is free don't show."""
    if nbytes < MIB:
        return 0
    step = max(MIB, 1 << max(0, nbytes.bit_length() - 4))
    return nbytes // step * step


def _scale_note(tier: Portion, of: str, nbytes: int) -> str:
    if nbytes == tier.described:
        return "As described; this machine has room for more."
    return f"At most {tier.share} of {of}; described with {format_exact(tier.described)}."


# --- the text ---------------------------------------------------------------------------------------------------------


def _write(name: str, sizes: _Sizes) -> str:
    pattern = PATTERNS[name]
    lines = [
        *_comment(f"kvtiers, preset {name}: {pattern.purpose}."),
        *_comment(sizes.heading),
        *_comment(
            "Try it: kvtiers config check --fit FILE. Run it: kvtiers serve --config FILE. All else: config reference."
        ),
        "storage:",
        *_gpu(pattern, written=sizes.pool),
        "",
        *_cpu(pattern, sizes),
        "",
        *_disk(pattern, sizes),
        "",
        *_remote(pattern.remote),
        "",
        *_background(),
    ]
    return "\n".join(lines) + "\n"


def _gpu(pattern: Pattern, *, written: bool) -> list[str]:
    lines = [
        "  gpu:",
        *_setting(
            "max_utilization", "0.80", "The rest stays free for bursts. Lower it if loads fail at peaks."
        ),
        *_setting("eviction_threshold", "0.75", "Above it chunks go to the CPU tier, the coldest first."),
    ]
    engine = (
        "Under an engine such as vLLM the GPU's memory is the engine's own: kvtiers serve makes no pool. "
    )
    if pattern.gpu is None:
        return [*lines, *_comment(f"{engine}For one in a library set capacity; the shares are of that.", 4)]
    size = f'capacity: "{format_exact(pattern.gpu)}"'
    if written:
        why = "A pool of our own, for transformers on a GPU that has so much free. Remove it where there is no GPU."
        return [*lines, *_comment(f"{engine}{why}", 4), f"    {size}"]
    why = (
        "For one in a library, on a GPU, set what the model leaves free; the pattern is described with this:"
    )
    return [*lines, *_comment(f"{engine}{why}", 4), f"    # {size}"]


def _cpu(pattern: Pattern, sizes: _Sizes) -> list[str]:
    return [
        "  cpu:",
        "    enabled: true",
        *_setting(
            "buffer_size",
            f'"{format_exact(sizes.cpu)}"',
            f"{pattern.cpu.why} Taken as a whole at start. {sizes.cpu_note}",
        ),
        *_setting("numa_aware", "true", "An equal part on each NUMA node; no effect with one."),
        *_setting(
            "eviction_policy",
            '"lru"',
            "The least recently used goes first. lfu keeps what many prompts begin with.",
        ),
        *_setting(
            "eviction_threshold",
            "0.90",
            "What lies above it is where loads from disk are staged. Lower it if loads are refused for want of slots.",
        ),
    ]


def _disk(pattern: Pattern, sizes: _Sizes) -> list[str]:
    if pattern.disk is None:
        return ["  disk:", *_setting("enabled", "false", pattern.without_disk)]
    lines = [
        "  disk:",
        "    enabled: true",
        *_setting(
            "path",
            json.dumps(sizes.disk_path, ensure_ascii=False),
            "A directory of its own on a local disk, or a list with one a disk. One process owns it at a time.",
        ),
        *_setting("max_size", f'"{format_exact(sizes.disk)}"', f"{pattern.disk.why} {sizes.disk_note}"),
    ]
    if pattern.compression == "none":
        return [
            *lines,
            *_setting("compression", '"none"', "As fast as the disk. zstd keeps more, and costs CPU time."),
        ]
    return [
        *lines,
        *_setting(
            "compression",
            f'"{pattern.compression}"',
            "Lossless: more in the same space, for CPU time. none where space is no matter.",
        ),
        *_setting(
            "compression_level", "3", "Higher ones save little: up to 15 all mean the same, then it is slow."
        ),
    ]


def _remote(remote: Remote | None) -> list[str]:
    if remote is None:
        return ["  remote:", *_setting("enabled", "false", "This pattern needs none.")]
    return [
        "  remote:",
        *_setting(
            "enabled",
            "true",
            f"{remote.what}; needs its client: pip install 'kvtiers[{remote.backend}]'. Without it a cache says so at each start and "
            "runs with the tiers above. Left on, so that nobody takes a cache of one node for a shared one.",
        ),
        f'    backend: "{remote.backend}"',
        *_setting("endpoint", json.dumps(remote.endpoint), remote.address),
        "    connection_pool_size: 32",
        *_setting("timeout_ms", "5000", "A call that takes longer is a miss."),
        *remote.more,
    ]


def _background() -> list[str]:
    return [
        "async:",
        *_setting(
            "max_workers",
            "8",
            "Threads for I/O. They mostly wait for the disk; more help only disks that take more at a time.",
            2,
        ),
        *_setting(
            "queue_size", "10000", "Beyond it a chunk is not written but stays where it was; nobody waits.", 2
        ),
        "  retry_policy:",
        "    max_retries: 3",
        "    backoff_factor: 2",
        "",
        "observability:",
        *_setting(
            "metrics_port",
            "8000",
            "Of kvtiers serve, on the loopback. For other machines set http_host and token_file.",
            2,
        ),
        "  health_check_interval: 30",
    ]


def _setting(key: str, value: str, why: str, indent: int = 4) -> list[str]:
    return [*_comment(why, indent), f"{' ' * indent}{key}: {value}"]


def _comment(text: str, indent: int = 0) -> list[str]:
    prefix = f"{' ' * indent}# "
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=prefix,
        subsequent_indent=prefix,
        break_on_hyphens=False,
        break_long_words=False,
    )
