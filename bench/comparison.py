"""The table: every workload on every server, round by round, and the ratios that come out of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench import fio
from bench.servers import Served
from bench.workloads import Workload

__all__ = ["Sample", "measure_table", "order_of_round", "rows_of"]


@dataclass(frozen=True)
class Sample:
    """One run: which workload on which server in which round, and how fast it was."""

    workload: Workload
    server: str
    round: int
    value: float


def order_of_round(servers: Sequence[Served], round_number: int) -> list[Served]:
    """Return the servers in the order of this round: every other round goes backwards, and every two begin elsewhere.

    So over the rounds each server runs early and late, and before and after each other one.
    """
    at = round_number // 2 % len(servers)
    order = [*servers[at:], *servers[:at]]
    return order[::-1] if round_number % 2 else order


def measure_table(
    servers: Sequence[Served],
    workloads: Sequence[Workload],
    rounds: int,
    seconds: float,
    tell: Callable[[str], None],
    prepare: Callable[[Served, int], None],
) -> list[Sample]:
    """Measure all ``workloads`` on all ``servers``, ``rounds`` times. ``tell`` gets a line for every row measured.

    ``prepare`` brings a server's disk into the state that the round (its number) is to begin with.
    """
    samples = []
    for round_number in range(rounds):
        for server in servers:
            prepare(server, round_number)
        for workload in workloads:
            now = {}
            for server in order_of_round(servers, round_number):
                speed = fio.measure(server.uri, workload.fio, seconds, seed=round_number + 1)
                now[server.name] = speed.in_unit(workload.unit)
                samples.append(Sample(workload, server.name, round_number, now[server.name]))
            values = "  ".join(f"{server.name} {now[server.name]:,.0f}" for server in servers)
            tell(f"round {round_number + 1}/{rounds} {workload.name:<10} {workload.unit}: {values}")
    return samples


def rows_of(state: str, samples: Sequence[Sample]) -> list[dict]:
    """Return a row for each workload and server: its median, and the median of its ratios to each other server.

    Ratios are taken within a round, where both ran one right after the other, and not between the medians, which may
    come from different weather.
    """
    values: dict[Workload, dict[str, list[float]]] = {}
    for sample in sorted(samples, key=lambda sample: sample.round):
        values.setdefault(sample.workload, {}).setdefault(sample.server, []).append(sample.value)
    return [
        {
            "state": state,
            "workload": workload.name,
            "server": server,
            "value": statistics.median(of_server),
            "unit": workload.unit,
            "ratio_to": {
                peer: statistics.median(ours / theirs for ours, theirs in zip(of_server, of_peer, strict=True))
                for peer, of_peer in by_server.items()
                if peer != server
            },
            "rounds": of_server,
        }
        for workload, by_server in values.items()
        for server, of_server in by_server.items()
    ]
