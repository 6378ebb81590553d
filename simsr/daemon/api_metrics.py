"""``GET /metrics``: what Prometheus scrapes. Read when asked; nothing is counted for it on the way of a request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from simsr.daemon.host import Host

__all__ = ["metrics_router"]


class _Collector:
    """Turns the statistics of a host into metrics."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def collect(self) -> Iterable[Metric]:
        yield from self._of_nbd()
        yield from self._of_srs()
        if self._host.theatre.play is not None:
            yield from self._of_scenario()

    def _of_nbd(self) -> Iterator[Metric]:
        nbd = self._host.nbd.statistics()
        yield GaugeMetricFamily("simsr_nbd_connections", "NBD connections that are open", nbd["connections"])
        yield CounterMetricFamily("simsr_nbd_connections", "NBD connections so far", nbd["connections_total"])
        yield CounterMetricFamily("simsr_nbd_requests", "NBD requests so far", nbd["requests_total"])

    def _of_srs(self) -> Iterator[Metric]:
        labels = ["sr", "name"]
        vdis = GaugeMetricFamily("simsr_vdis", "disks and snapshots", labels=labels)
        size = GaugeMetricFamily("simsr_sr_size_bytes", "what the SR may take on its host", labels=labels)
        used = GaugeMetricFamily("simsr_sr_used_bytes", "what it has taken", labels=labels)
        written = CounterMetricFamily("simsr_log_appended_bytes", "data appended to the log since the start", labels=labels)
        flushes = CounterMetricFamily("simsr_log_flushes", "syncs of the log since the start", labels=labels)
        for uuid, mounted in self._host.mounted.items():
            sr, who = mounted.repository.describe(), [uuid, mounted.repository.name]
            log = mounted.repository.store.log.statistics()
            vdis.add_metric(who, sr["vdi_count"] + sr["snapshot_count"])
            size.add_metric(who, sr["physical_size_bytes"])
            used.add_metric(who, sr["physical_utilisation_bytes"])
            written.add_metric(who, log["bytes_appended"])
            flushes.add_metric(who, log["flushes"])
        yield from (vdis, size, used, written, flushes)

    def _of_scenario(self) -> Iterator[Metric]:
        found = self._host.theatre.playing.statistics()
        labels = ["scenario", "rule", "action"]
        hits = CounterMetricFamily("simsr_rule_hits", "times that a rule has fired", labels=labels)
        matched = CounterMetricFamily("simsr_rule_matched", "requests that a rule has looked at", labels=labels)
        for rule in found["rules"]:
            who = [found["scenario"], rule["rule"], rule["action"]]
            hits.add_metric(who, rule["hits"])
            matched.add_metric(who, rule["matched"])
        yield from (hits, matched)
        yield CounterMetricFamily("simsr_scenario_decided", "requests that a scenario decided on", found["decided"])
        yield GaugeMetricFamily("simsr_scenario_hung", "requests that hang now", found["hung"])


def metrics_router(host: Host) -> APIRouter:
    """The route, for one host."""
    router, registry = APIRouter(), CollectorRegistry(auto_describe=False)
    registry.register(_Collector(host))

    @router.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return router
