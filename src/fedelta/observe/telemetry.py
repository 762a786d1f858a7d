"""A coordinator's rounds and requests as OpenTelemetry traces and metrics.

A span for each round, and in it one for each request to a site, from when it was handed over until its reply was taken;
a request that failed has the status ERROR and why. Metrics are counters by operation: `fedelta.rounds`,
`fedelta.replies`, `fedelta.failures`, `fedelta.bytes` (by direction), and a histogram, `fedelta.request.duration`.
Bytes are those of messages as encoded, without what a transport adds.

Where it is sent the standard variables say: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_HEADERS,
OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, OTEL_SDK_DISABLED and the others of the OpenTelemetry specification.
OTEL_TRACES_EXPORTER and OTEL_METRICS_EXPORTER are "otlp" if not set, and may be "console" or "none". OTLP goes over
gRPC; over HTTP as well once opentelemetry-exporter-otlp-proto-http is installed.

A collector that cannot be reached costs what was to be sent, and nothing else: the SDK says so in the log, and rounds
do not wait for it, but for a few seconds at the end. Needs the extra "telemetry".
"""

import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal

from fedelta.core import codec
from fedelta.core.errors import BadInput
from fedelta.core.extras import require
from fedelta.core.messages import Replies, Reply, Request, Requests
from fedelta.core.program import Fleet, Report
from fedelta.core.watched import Watched

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Span, TracerProvider

EXTRA = "telemetry"
_NAME = "fedelta"
_WITHHELD = "not told: no guarantee covers why"
_CANCELLED = "withdrawn"
_LAST_S = 5.0  # for what is left to be sent at the end


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A request that is outstanding."""

    span: "Span"
    op: str
    all: str  # the id of the requests that it is one of, by which they are withdrawn together
    since: float


class Telemetry:
    """Traces and metrics of one run; to be closed.

    telemetry = Telemetry(tracers, meters)
    watched = telemetry.watch(fleet)
    for state, report in run(program, watched):
        telemetry.show(report)

    `told` False leaves out why a site failed, as reports do under a guarantee: it may depend on the site's data.
    """

    def __init__(
        self,
        tracers: "TracerProvider",
        meters: "MeterProvider",
        *,
        job: str = "",
        told: bool = True,
        exporters: Sequence[Any] = (),
    ) -> None:
        """`job` is said of every span, unless a request has its own. `exporters` are broken off by a late `close`."""
        self._providers: tuple[Any, ...] = (tracers, meters)
        self._exporters = exporters
        self._tracer = tracers.get_tracer(_NAME)
        meter = meters.get_meter(_NAME)
        self._rounds = meter.create_counter("fedelta.rounds", unit="{round}", description="Rounds that are over.")
        self._replies = meter.create_counter("fedelta.replies", unit="{reply}", description="Replies of sites.")
        self._failures = meter.create_counter(
            "fedelta.failures", unit="{reply}", description="Replies that say why there is none."
        )
        self._bytes = meter.create_counter("fedelta.bytes", unit="By", description="Of messages, as encoded.")
        self._duration = meter.create_histogram(
            "fedelta.request.duration", unit="s", description="From when a site is asked until its reply is taken."
        )
        self._job, self._told = job, told
        self._round: tuple[int, Span] | None = None
        self._asked: dict[str, _Asked] = {}

    @classmethod
    def from_environment(cls, *, job: str = "", told: bool = True) -> "Telemetry":
        """As the standard variables say. Raises BadInput if the extra is not installed, or for an unknown exporter."""
        require(EXTRA, "opentelemetry")
        require(EXTRA, "opentelemetry.sdk", "opentelemetry.exporter")
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        named = "service.name=" in _setting("OTEL_RESOURCE_ATTRIBUTES", "") or _setting("OTEL_SERVICE_NAME", "")
        resource = Resource.create({} if named else {"service.name": "fedelta-coordinator"})
        tracers = TracerProvider(resource=resource, shutdown_on_exit=False)
        of_traces, of_metrics = _exporters("traces"), _exporters("metrics")
        for exporter in of_traces:
            tracers.add_span_processor(BatchSpanProcessor(exporter))
        readers = [PeriodicExportingMetricReader(exporter) for exporter in of_metrics]
        meters = MeterProvider(readers, resource=resource, shutdown_on_exit=False)
        return cls(tracers, meters, job=job, told=told, exporters=[*of_traces, *of_metrics])

    def watch(self, fleet: Fleet) -> Fleet:
        """The same fleet, whose requests and replies are traced."""
        return Watched(fleet=fleet, on_request=self._ask, on_reply=self._reply, on_cancel=self._cancel)

    def show(self, report: Report) -> None:
        """A round is over."""
        span = self._within(report.round)
        span.set_attributes(
            {
                "fedelta.sites.asked": len(report.cohort),
                "fedelta.sites.absent": len(report.absent),
                "fedelta.bytes_down": report.bytes_down,
                "fedelta.bytes_up": report.bytes_up,
            }
        )
        self._rounds.add(1)
        self._end_round()

    def failed(self, why: str) -> None:
        """The round came to nothing; it may be begun again."""
        if self._round is not None:
            self._round[1].set_status(_error(why if self._told else _WITHHELD))
        self._end_round()

    def close(self) -> None:
        """Send what is left, for a few seconds at most: the SDK alone would wait for half a minute."""
        self._end_round()
        ends = [threading.Thread(target=provider.shutdown, daemon=True) for provider in self._providers]
        for end in ends:
            end.start()
        if not _ended(ends, _LAST_S):  # a call that goes on would keep the process from ending until its own timeout
            for exporter in self._exporters:
                exporter.shutdown()
            _ended(ends, _LAST_S / 5)

    def _ask(self, asked: Request | Requests) -> None:
        from opentelemetry.trace import set_span_in_context

        requests = asked if isinstance(asked, Requests) else [asked]
        all = asked.id if isinstance(asked, Requests) else asked.id.removesuffix(f"/{asked.to}")
        alike: int | None = None  # bytes of a request that is the broadcast alone
        for request in requests:
            if request.body or request.meta:
                size = codec.size({**request.shared, **request.body}, request.meta)
            else:
                size = alike = codec.size(request.shared) if alike is None else alike
            attributes: dict[str, str | int] = {
                "fedelta.site": request.to,
                "fedelta.op": request.op,
                "fedelta.round": request.round,
                "fedelta.attempt": request.attempt,
                "fedelta.bytes_down": size,
            }
            if request.job or self._job:
                attributes["fedelta.job"] = request.job or self._job
            within = set_span_in_context(self._within(request.round))
            span = self._tracer.start_span(f"request {request.op}", within, attributes=attributes)
            self._bytes.add(size, {"direction": "down", "op": request.op})
            self._asked[request.id] = _Asked(span=span, op=request.op, all=all, since=time.monotonic())

    def _reply(self, reply: Reply | Replies) -> None:
        if isinstance(reply, Reply):
            size = 0 if reply.error is not None else codec.size(reply.body, reply.meta)
            self._answered(reply.answers, size, reply.error)
            return
        size = codec.size(reply.body) // max(1, len(reply.senders))  # what was summed or stacked: a share each
        for sender in reply.senders:
            self._answered(f"{reply.answers}/{sender}", size, None)
        for sender, error in reply.errors.items():
            self._answered(f"{reply.answers}/{sender}", 0, error)

    def _cancel(self, request_id: str) -> None:
        for one in [id for id, asked in self._asked.items() if request_id in (id, asked.all)]:
            self._withdraw(self._asked.pop(one))

    def _answered(self, request_id: str, size: int, error: str | None) -> None:
        asked = self._asked.pop(request_id, None)
        if asked is None:
            return
        labels = {"op": asked.op}
        self._replies.add(1, labels)
        self._duration.record(time.monotonic() - asked.since, labels)
        if error is None:
            self._bytes.add(size, {"direction": "up", **labels})
            asked.span.set_attribute("fedelta.bytes_up", size)
        else:
            self._failures.add(1, labels)
            asked.span.set_status(_error(error if self._told else _WITHHELD))
        asked.span.set_attribute("fedelta.failed", error is not None)
        asked.span.end()

    @staticmethod
    def _withdraw(asked: _Asked) -> None:
        asked.span.set_attribute("fedelta.cancelled", True)
        asked.span.end()

    def _within(self, round: int) -> "Span":
        """The span of a round, which begins with its first request."""
        if self._round is None or self._round[0] != round:
            self._end_round()
            attributes: dict[str, str | int] = {"fedelta.round": round}
            if self._job:
                attributes["fedelta.job"] = self._job
            self._round = round, self._tracer.start_span("round", attributes=attributes)
        return self._round[1]

    def _end_round(self) -> None:
        for asked in self._asked.values():
            self._withdraw(asked)
        self._asked.clear()
        if self._round is not None:
            self._round[1].end()
            self._round = None


def _ended(threads: Sequence[threading.Thread], within_s: float) -> bool:
    until = time.monotonic() + within_s
    for one in threads:
        one.join(max(0.0, until - time.monotonic()))
    return not any(one.is_alive() for one in threads)


def _error(why: str) -> Any:
    from opentelemetry.trace import Status, StatusCode

    return Status(StatusCode.ERROR, why)


def _exporters(signal: Literal["traces", "metrics"]) -> list[Any]:
    """Those that the variables of a signal name, of all that are installed."""
    upper = signal.upper()
    found = []
    for name in _setting(f"OTEL_{upper}_EXPORTER", "otlp").split(","):
        name = name.strip()
        if name == "none":
            continue
        if name == "otlp":
            variable = f"OTEL_EXPORTER_OTLP_{upper}_PROTOCOL"
            protocol = _setting(variable, _setting("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"))
            name = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}.get(protocol, protocol)
        known: Mapping[str, Any] = {one.name: one for one in entry_points(group=f"opentelemetry_{signal}_exporter")}
        if name not in known:
            raise BadInput(
                f"OpenTelemetry has no exporter {name!r} for {signal} here, only {', '.join(sorted(known))}; set "
                f"OTEL_{upper}_EXPORTER or OTEL_EXPORTER_OTLP_PROTOCOL, or install it"
            )
        found.append(known[name].load()())
    return found


def _setting(name: str, default: str) -> str:
    """Of a variable; the specification takes an empty one as not set."""
    return os.environ.get(name, "").strip() or default
