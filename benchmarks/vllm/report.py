"""What the rounds of `ttft.py` come to: a table, with each contestant against the others of its round."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.vllm.servers import Answer

COLD, WARM = "no connector, second turn, cold", "no connector, second turn, warm"
FIRST = "no connector, first turn, cold"
SAME = "no connector, second turn, whole chunks warm"
TIERS = {
    "kvtiers, from CPU memory": "memory",
    "kvtiers, from disk": "disk",
    "kvtiers, both restarted": "disk",
}
Answers = dict[str, list[Answer]]


def table(report: dict[str, Any]) -> str:
    """Medians, least and most, and each in relation to no cache, the warm prefix cache and what it could take, round by round."""
    answers: Answers = {
        name: [Answer(**answer) for answer in rows] for name, rows in report["answers"].items()
    }
    cold, warm, first = answers[COLD], answers[WARM], answers[FIRST]
    tokens = [answer.tokens for answer in cold]
    rates = report["bytes_per_s"]
    lines = [
        (
            f"second turns of {min(tokens)} to {max(tokens)} tokens, median {statistics.median(tokens):.0f}; {len(cold)} rounds; "
            f"chunks of {report['chunk_tokens']} tokens, {report['bytes_per_token']:.0f} bytes a token; "
            f"memory copies {rates['memory'] / 1e9:.1f} GB/s, the disk reads {rates['disk'] / 1e9:.1f} GB/s"
        ),
        "",
        "| | TTFT, median [min-max] | / cold | - warm | / what it could take |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, rows in answers.items():
        base = first if "first turn" in name else cold
        values = [answer.ttft for answer in rows]
        low, high = spread(values)
        ratio = statistics.median(a.ttft / b.ttft for a, b in zip(rows, base, strict=True))
        beyond = statistics.median(a.ttft - b.ttft for a, b in zip(rows, warm, strict=True))
        could = ""
        if name in TIERS:
            seconds_a_token = report["bytes_per_token"] / rates[TIERS[name]]
            shares = [
                hit.ttft / possible(hit, same, seconds_a_token)
                for hit, same in zip(rows, answers[SAME], strict=True)
            ]
            could = "{:.2f} [{:.2f}-{:.2f}]".format(statistics.median(shares), *spread(shares))
        beyond_text = "" if "first turn" in name else f"{beyond:+.2f} s"
        lines.append(
            f"| {name} | {statistics.median(values):.2f} s [{low:.2f}-{high:.2f}] | {ratio:.2f} | {beyond_text} | {could} |"
        )
    if "LMCache, from CPU memory" in answers:
        pairs = zip(answers["kvtiers, from CPU memory"], answers["LMCache, from CPU memory"], strict=True)
        beside_peer = [ours.ttft / theirs.ttft for ours, theirs in pairs]
        lines += [
            "",
            "from CPU memory beside LMCache: {:.2f} [{:.2f}-{:.2f}]".format(
                statistics.median(beside_peer), *spread(beside_peer)
            ),
        ]
    rates = report["throughput_tokens_per_s"]
    shares = [a / b for a, b in zip(rates["kvtiers"], rates["none"], strict=True)]
    lines += [
        "",
        f"mixed load: {' '.join(f'{share:.2f}' for share in shares)} of the tokens per second without connector",
    ]
    steps = max(
        (record["steps"] for record in report["engine_threads"].values()), key=lambda one: one["count"]
    )
    for process, record in report["engine_threads"].items():
        lines.append(
            f"process {process}: {record['total_s']:.3f} s in the connector, {100 * record['total_s'] / steps['seconds']:.2f} % of "
            f"{steps['seconds']:.0f} s of {steps['count']} steps"
        )
    return "\n".join(lines)


def possible(hit: Answer, same: Answer, seconds_a_token: float) -> float:
    """Seconds: those of a prefix cache that is warm for as many tokens, and of the hit's bytes. Raises ValueError if it was for others."""
    if same.cached != hit.cached:
        raise ValueError(
            f"{hit.cached} tokens of the hit were cached, {same.cached} of what it is held against"
        )
    return same.ttft + hit.cached * seconds_a_token


def spread(values: list[float]) -> tuple[float, float]:
    """The least and the most: a handful of rounds has no percentiles worth the name."""
    return min(values), max(values)
