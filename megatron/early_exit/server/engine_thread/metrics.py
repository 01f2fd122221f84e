"""Figures for Prometheus, under the names that vLLM gives them, with a prefix of ours."""

from collections.abc import Callable, Iterator
from time import perf_counter

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from prometheus_client import Counter as Count
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from megatron.early_exit.inference.engine.cache_pages import CacheCounts, CachePages
from megatron.early_exit.inference.engine.request import Request
from megatron.early_exit.inference.results import GeneratedToken
from megatron.early_exit.server.engine_thread.histogram import SecondsHistogram

_PREFIX = "early_exit:"


class TokenTally(Collector):
    """Tokens, and the layers that gave them; written by one thread, read by any.

    Args:
        prefix: of the names for Prometheus.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._by_layer: dict[int, int] = {}

    def add(self, layer: int) -> None:
        """Count a token."""
        self._by_layer[layer] = self._by_layer.get(layer, 0) + 1

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The figures for Prometheus."""
        by_layer = dict(self._by_layer)
        name = f"{self._prefix}generation_tokens"
        yield CounterMetricFamily(name, "Generated tokens.", sum(by_layer.values()))
        name, text = f"{self._prefix}exit_tokens", "Generated tokens by the layer that gave them."
        exits = CounterMetricFamily(name, text, labels=["layer"])
        for layer, count in sorted(by_layer.items()):
            exits.add_metric([str(layer)], count)
        yield exits


class CacheTally(Collector):
    """What the caches have saved and cost.

    Args:
        prefix: of the names for Prometheus.
        counts: written by the engine's thread.
    """

    def __init__(self, prefix: str, counts: CacheCounts) -> None:
        self._prefix, self._counts = prefix, counts

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The figures for Prometheus."""
        counts = self._counts
        for name, text, value in (
            ("prefix_cache_queries", "Tokens of prompts that began.", counts.prompt_tokens),
            ("prefix_cache_hits", "Those that were not computed again.", counts.cached_tokens),
            ("num_preemptions", "Sequences that had to wait for memory.", counts.preemptions),
        ):
            yield CounterMetricFamily(self._prefix + name, text, value)


class Metrics:
    """Counts what the server does; sequences in the engine's thread, answers in any."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        count, histogram = self._counter, self._histogram
        self._running = self._gauge("num_requests_running", "Sequences in the batches.")
        self._waiting = self._gauge("num_requests_waiting", "Sequences that wait for their turn.")
        self._cache = self._gauge("kv_cache_usage_perc", "Share of the caches' memory in use.")
        self._prompt = count("prompt_tokens", "Tokens of prompts.")
        self._tokens = TokenTally(_PREFIX)
        self.registry.register(self._tokens)
        self._answers = count("http_answers", "Answers by their HTTP status.", "status")
        self._ended = count("request_success", "Sequences by how they ended.", "finished_reason")
        self._first = histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self._between = histogram("inter_token_latency_seconds", "From a token to the next.")
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the end.")
        self._drafts = count("spec_decode_num_drafts", "Verifications of drafted tokens.")
        self._drafted = count("spec_decode_num_draft_tokens", "Drafted tokens.")
        self._accepted = count("spec_decode_num_accepted_tokens", "Accepted draft tokens.")
        self._since: dict[int, tuple[float, float]] = {}

    def watch(
        self,
        num_running: Callable[[], int],
        num_waiting: Callable[[], int],
        pages: CachePages,
    ) -> None:
        """Read these numbers of an engine whenever somebody asks for the figures."""
        self._running.set_function(num_running)
        self._waiting.set_function(num_waiting)
        self._cache.set_function(lambda: pages.usage)
        self.registry.register(CacheTally(_PREFIX, pages.counts))

    def text(self) -> bytes:
        """All figures."""
        return generate_latest(self.registry)

    def answered(self, status: int) -> None:
        """Count a request that has got an answer, or the beginning of one."""
        self._answers.labels(str(status)).inc()

    def began(self, requests: list[Request]) -> None:
        """Count sequences that the engine has taken in."""
        now = perf_counter()
        for request in requests:
            self._prompt.inc(len(request.prompt_token_ids))
            self._since[request.key] = (now, 0.0)

    def token(self, request: Request, token: GeneratedToken) -> None:
        """Count a new token of a sequence."""
        self._tokens.add(token.exit_layer)
        now = perf_counter()
        began, last = self._since[request.key]
        if last:
            self._between.observe(now - last)
        else:
            self._first.observe(now - began)
        self._since[request.key] = (began, now)

    def ended(self, request: Request) -> None:
        """Count a sequence that has ended, for whatever reason."""
        began, _ = self._since.pop(request.key)
        self._whole.observe(perf_counter() - began)
        self._ended.labels(str(request.finish_reason)).inc()
        if (counts := request.mode.counts) is not None:
            self._drafts.inc(counts.verifications)
            self._drafted.inc(counts.drafted)
            self._accepted.inc(counts.accepted)

    def _counter(self, name: str, text: str, *labels: str) -> Count:
        return Count(_PREFIX + name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(_PREFIX + name, text, registry=self.registry)

    def _histogram(self, name: str, text: str) -> SecondsHistogram:
        histogram = SecondsHistogram(_PREFIX + name, text)
        self.registry.register(histogram)
        return histogram
