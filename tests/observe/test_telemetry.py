"""Traces and metrics of rounds, read back from the SDK's exporters in memory."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import torch
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    MetricsServiceServicer,
    add_MetricsServiceServicer_to_server,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from fedelta.core import codec
from fedelta.core.errors import BadInput
from fedelta.core.messages import Reply, Request, Requests
from fedelta.core.program import Report, run
from fedelta.fleet.local import Local
from fedelta.observe.telemetry import Telemetry
from fleet_program import NAMES, Play, load

SHARED = {"w": torch.arange(100.0)}


class Here:
    """Telemetry whose spans and metrics stay in this process."""

    def __init__(self, **options: Any) -> None:
        self._spans, self._reader = InMemorySpanExporter(), InMemoryMetricReader()
        tracers = TracerProvider(shutdown_on_exit=False)
        tracers.add_span_processor(SimpleSpanProcessor(self._spans))
        self.telemetry = Telemetry(tracers, MeterProvider([self._reader], shutdown_on_exit=False), **options)

    def spans(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._spans.get_finished_spans() if span.name == name]

    def metrics(self) -> dict[str, dict[tuple[str, ...], float]]:
        """By name, then by the values of their attributes."""
        data = self._reader.get_metrics_data()
        assert data is not None
        return {
            metric.name: {
                tuple(str(value) for _, value in sorted(point.attributes.items())): getattr(point, "value", None)
                or point.count
                for point in metric.data.data_points
            }
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


def test_a_run_is_a_span_for_each_round_and_in_it_one_for_each_request() -> None:
    here = Here(job="a run")
    program = Play(rounds=2)
    plain = [state for state, _ in run(program, Local(program, load, NAMES))]
    seen = []
    for state, report in run(program, here.telemetry.watch(Local(program, load, NAMES))):
        here.telemetry.show(report)
        seen.append(state)
    assert torch.equal(plain[-1][1], seen[-1][1])  # it only looks
    rounds, requests = here.spans("round"), here.spans("request train")
    assert [dict(span.attributes or {})["fedelta.round"] for span in rounds] == [1, 2]
    assert [dict(span.attributes or {})["fedelta.sites.absent"] for span in rounds] == [1, 1]
    assert len(requests) == 10
    for span in requests:
        found = dict(span.attributes or {})
        within = rounds[int(str(found["fedelta.round"])) - 1]
        assert span.parent is not None
        assert span.parent.span_id == within.context.span_id
        assert within.start_time <= span.start_time <= span.end_time <= within.end_time  # type: ignore[operator]
        assert (found["fedelta.op"], found["fedelta.job"]) == ("train", "a run")
        failed = found["fedelta.site"] == "elm"
        assert found["fedelta.failed"] is failed
        assert (span.status.status_code is StatusCode.ERROR) is failed
        assert failed == ("elm.csv" in (span.status.description or ""))
        assert found["fedelta.bytes_down"] == codec.size({"vector": seen[-1][1]})
    numbers = here.metrics()
    assert numbers["fedelta.rounds"] == {(): 2}
    assert numbers["fedelta.replies"] == numbers["fedelta.request.duration"] == {("train",): 10}
    assert numbers["fedelta.failures"] == {("train",): 2}
    assert numbers["fedelta.bytes"] == {
        ("down", "train"): 10 * codec.size({"vector": seen[-1][1]}),
        ("up", "train"): 8 * codec.size({"difference": seen[-1][1]}),
    }


@pytest.mark.parametrize("together", [1, 3])
def test_requests_that_are_handled_in_one_go_are_told_apart(together: int) -> None:
    here = Here()
    fleet = here.telemetry.watch(Local(Play(), load, NAMES[:4]))
    assert [*fleet.parties()] == [*NAMES[:4]]
    fleet.submit_many(Requests(to=NAMES[:4], op="echo", round=1, shared=SHARED), together)
    while fleet.next_reply() is not None:
        pass
    found = {dict(span.attributes or {})["fedelta.site"] for span in here.spans("request echo")}
    assert found == {*NAMES[:4]}
    assert here.metrics()["fedelta.replies"] == {("echo",): 4}
    assert "fedelta.job" not in dict(here.spans("request echo")[0].attributes or {})


class Deaf:
    """A fleet whose sites never answer."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []

    def parties(self) -> Sequence[str]:
        return NAMES

    def submit(self, request: Request) -> None: ...

    def submit_many(self, requests: Requests, together: int) -> None: ...

    def next_reply(self, timeout_s: float | None = None) -> Reply | None:
        return None

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)


def test_what_is_withdrawn_or_left_over_ends_as_well() -> None:
    here, deaf = Here(), Deaf()
    fleet = here.telemetry.watch(deaf)
    requests = Requests(to=NAMES[:2], op="echo", round=1)
    fleet.submit_many(requests, 1)
    single = Request(to="cedar", op="count", round=1)
    other = Request(to="dune", op="wait", round=1)
    fleet.submit(single)
    fleet.submit(other)
    fleet.cancel(requests.id)
    fleet.cancel(single.id)
    assert deaf.cancelled == [requests.id, single.id]
    ended = [*here.spans("request echo"), *here.spans("request count")]
    assert len(ended) == 3
    assert here.spans("request wait") == []
    here.telemetry.failed("too few sites answered")
    (span,) = here.spans("round")
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "too few sites answered")
    ended += here.spans("request wait")
    assert len(ended) == 4
    assert all(dict(one.attributes or {})["fedelta.cancelled"] for one in ended)
    fleet.submit(Request(to="cedar", op="count", round=1, attempt=1))
    here.telemetry.show(Report(round=1))
    assert len(here.spans("round")) == 2


def test_why_a_site_failed_is_withheld_where_reports_withhold_it() -> None:
    here = Here(told=False)
    fleet = here.telemetry.watch(Local(Play(), load, NAMES))
    fleet.submit(Request(to="elm", op="train", round=1, shared={"vector": Play().init()[1]}))
    reply = fleet.next_reply()
    assert isinstance(reply, Reply)
    assert "elm.csv" in str(reply.error)
    (span,) = here.spans("request train")
    assert span.status.status_code is StatusCode.ERROR
    assert "elm.csv" not in str(span.status.description)


PRINTED = """
from fedelta.core.program import Report
from fedelta.observe.telemetry import Telemetry
telemetry = Telemetry.from_environment(job="a run")
telemetry.show(Report(round=7))
telemetry.close()
"""


@pytest.mark.parametrize("service", ["", "ours"])
def test_it_is_configured_by_the_standard_variables(service: str) -> None:
    own = {"OTEL_TRACES_EXPORTER": "console", "OTEL_METRICS_EXPORTER": "none", "OTEL_SERVICE_NAME": service}
    own["OTEL_RESOURCE_ATTRIBUTES"] = "deployment.environment.name=trial"
    printed = subprocess.run(
        [sys.executable, "-c", PRINTED], env=os.environ | own, capture_output=True, text=True, check=True
    ).stdout
    span = json.loads(printed)
    assert span["attributes"]["fedelta.round"] == 7
    assert span["attributes"]["fedelta.job"] == "a run"
    assert span["resource"]["attributes"]["service.name"] == (service or "fedelta-coordinator")
    assert span["resource"]["attributes"]["deployment.environment.name"] == "trial"


def test_an_exporter_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(BadInput, match="no exporter 'zipkin' for traces"):
        Telemetry.from_environment()


def test_a_collector_that_is_not_there_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    telemetry = Telemetry.from_environment()
    fleet = telemetry.watch(Local(Play(), load, NAMES))
    for number in (1, 2, 3):
        fleet.submit(Request(to="amber", op="echo", round=number, shared=SHARED))
        assert fleet.next_reply() is not None
        telemetry.show(Report(round=number))
    telemetry.close()


class Stuck(SpanExporter):
    """One whose collector never answers: it waits until it is shut down."""

    def __init__(self) -> None:
        self.broken_off = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.broken_off.wait()
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        self.broken_off.set()


def test_a_collector_that_never_answers_is_broken_off_in_the_end() -> None:
    stuck, tracers = Stuck(), TracerProvider(shutdown_on_exit=False)
    tracers.add_span_processor(BatchSpanProcessor(stuck))
    telemetry = Telemetry(tracers, MeterProvider(shutdown_on_exit=False), exporters=[stuck])
    telemetry.show(Report(round=1))
    telemetry.close()
    assert stuck.broken_off.is_set()  # or the process could not end before the call does


def test_it_reaches_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    got: dict[str, list[Any]] = {"trace": [], "metrics": []}

    class Traces(TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> ExportTraceServiceResponse:
            got["trace"] += [s for r in request.resource_spans for scope in r.scope_spans for s in scope.spans]
            return ExportTraceServiceResponse()

    class Metrics(MetricsServiceServicer):
        def Export(self, request: Any, context: Any) -> ExportMetricsServiceResponse:
            got["metrics"] += [m for r in request.resource_metrics for scope in r.scope_metrics for m in scope.metrics]
            return ExportMetricsServiceResponse()

    collector = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(Traces(), collector)
    add_MetricsServiceServicer_to_server(Metrics(), collector)
    port = collector.add_insecure_port("127.0.0.1:0")
    collector.start()
    try:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "120")
        monkeypatch.setattr("fedelta.observe.telemetry._LAST_S", 120.0)
        telemetry = Telemetry.from_environment()
        fleet = telemetry.watch(Local(Play(), load, NAMES))
        fleet.submit(Request(to="amber", op="echo", round=1, shared=SHARED))
        assert fleet.next_reply() is not None
        telemetry.show(Report(round=1))
        telemetry.close()
    finally:
        collector.stop(None)
    assert [span.name for span in got["trace"]] == ["request echo", "round"]
    assert {metric.name for metric in got["metrics"]} >= {"fedelta.rounds", "fedelta.replies", "fedelta.bytes"}
