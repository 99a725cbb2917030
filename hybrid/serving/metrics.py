"""What Prometheus reads at /metrics."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from hybrid.generation.engine import Engine

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Counts of one server."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("hybrid_requests", "Texts that ended.", ["route", "reason"], **common)
        self.refused = Counter("hybrid_refused", "Requests that were refused.", ["status"], **common)
        self.prompt_tokens = Counter("hybrid_prompt_tokens", "Tokens of prompts.", **common)
        self.tokens = Counter("hybrid_generated_tokens", "Tokens that were made.", **common)
        self.first_token = Histogram(
            "hybrid_time_to_first_token_seconds", "From request to first token.", buckets=_SECONDS, **common
        )
        self.next_token = Histogram("hybrid_time_per_token_seconds", "From token to token.", buckets=_SECONDS, **common)
        self.duration = Histogram("hybrid_text_seconds", "From request to end.", buckets=_SECONDS, **common)
        running = Gauge("hybrid_running", "Texts that are being made.", **common)
        waiting = Gauge("hybrid_waiting", "Texts that wait for a slot.", **common)
        slots = Gauge("hybrid_slots", "Texts that can be made together.", **common)
        running.set_function(lambda: engine.running)
        waiting.set_function(lambda: engine.waiting)
        slots.set(engine.runner.room.slots)
