"""Numbers for Prometheus, under vLLM's names with `npuq_` before them. No label comes from a request's text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..runtime import Completion
from ..runtime.engine import Engine

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)


class Metrics:
    """The numbers of one server."""

    def __init__(self, engine: Engine):
        registry = self._registry = CollectorRegistry()
        registry.register(_EngineNumbers(engine))

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"npuq_{name}", text, labels, registry=registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"npuq_{name}_seconds", text, buckets=_SECONDS, registry=registry)

        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of finished requests.")
        self.cached_tokens = counter("prompt_tokens_cached", "Those of them that the cache held.")
        self.generation_tokens = counter("generation_tokens", "Generated tokens.")
        self.success = counter("request_success", "Finished completions.", ("finished_reason",))
        self.rejected = counter("rejected", "Requests refused before they were queued.", ("why",))
        self.cancelled = counter("request_cancelled", "Requests whose client left.")
        self.unknown_fields = counter("unknown_fields", "Fields of requests that this server does not know.")
        self.malformed_calls = counter(
            "malformed_tool_calls", "Tool calls that came back as content: none could be read."
        )
        self.first_token = seconds("time_to_first_token", "From a request's arrival to its first text.")
        self.inter_token = seconds("inter_token_latency", "Between two tokens of a stream.")
        self.queue_time = seconds("request_queue_time", "From a request's admission to its first step.")
        self.latency = seconds("e2e_request_latency", "From a request's arrival to its end.")
        self.step = seconds("step", "A step of the engine.")

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self._registry)

    def completed(self, completion: Completion, first_choice: bool) -> None:
        """Count a completion; its prompt once for all its choices."""
        if first_choice:
            self.prompt_tokens.inc(completion.prompt_tokens)
            self.cached_tokens.inc(completion.cached_tokens)
        self.generation_tokens.inc(completion.completion_tokens)
        self.malformed_calls.inc(completion.malformed_calls)
        self.success.labels(completion.finish_reason).inc()


class _EngineNumbers(Collector):
    """Figures that the engine keeps, read at each scrape."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        scheduler, blocks = self._engine.scheduler, self._engine.blocks
        yield GaugeMetricFamily("npuq_num_requests_running", "Sequences in steps.", scheduler.num_running)
        yield GaugeMetricFamily("npuq_num_requests_waiting", "Sequences that wait.", scheduler.num_waiting)
        used = 1 - blocks.num_free / blocks.num_blocks
        yield GaugeMetricFamily("npuq_kv_cache_usage_perc", "Share of the cache's blocks in use, 0 to 1.", used)
        yield CounterMetricFamily(
            "npuq_num_preemptions", "Sequences that gave up their blocks.", scheduler.num_preempted
        )
