"""Prometheus metrics of the server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.process_collector import ProcessCollector

from loramix.defaults import BASE
from loramix.server.supervisor import Supervisor

PHASES = ("queue", "features", "gate", "first_token", "total")
_BUCKETS = (0.0005, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counters, gauges and histograms of one server.

    Args:
        supervisor: its queue is read at each scrape.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "loramix", "registry": self.registry}
        self.requests = Counter("requests", "Requests by path and status.", ["path", "status"], **own)
        self.tokens = Counter("tokens", "Tokens read, found in a cache, and answered.", ["kind"], **own)
        self.routes = Counter("routes", "Answers by the skills that gave them.", ["skill", "policy"], **own)
        self.seconds = Histogram("seconds", "Seconds by phase.", ["phase"], buckets=_BUCKETS, **own)
        Gauge("queue_waiting", "Requests in the queue.", **own).set_function(lambda: len(supervisor.waiting))
        Gauge("active", "Requests that the worker has.", **own).set_function(lambda: len(supervisor.active))
        Gauge("worker_ready", "Whether the worker takes requests.", **own).set_function(
            lambda: supervisor.ready
        )
        Gauge("worker_restarts", "Workers that died.", **own).set_function(lambda: supervisor.restarts)
        ProcessCollector(registry=self.registry)

    def routed(self, route: Mapping[str, Any]) -> None:
        """Count a route once for each skill of its mixes."""
        skills = {name for mix in (route["mix"], *route["then"]) for name in mix} or {BASE}
        for skill in skills:
            self.routes.labels(skill, route["policy"]).inc()

    def answered(self, usage: Mapping[str, int], timings: Mapping[str, float]) -> None:
        """Count the tokens and times of an answer."""
        cached = usage["cached_tokens"]
        self.tokens.labels("prompt").inc(usage["prompt_tokens"] - cached)
        self.tokens.labels("cached").inc(cached)
        self.tokens.labels("completion").inc(usage["completion_tokens"])
        for phase in PHASES:
            if phase in timings:
                self.seconds.labels(phase).observe(timings[phase])

    def text(self) -> bytes:
        """Return all metrics in Prometheus text format."""
        return generate_latest(self.registry)
