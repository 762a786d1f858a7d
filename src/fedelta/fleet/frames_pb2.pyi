from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Hello(_message.Message):
    __slots__ = ("protocol", "name", "experiment", "versions", "known", "model")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    name: str
    experiment: str
    versions: _containers.ScalarMap[str, str]
    known: _containers.RepeatedScalarFieldContainer[bytes]
    model: str
    def __init__(self, protocol: _Optional[int] = ..., name: _Optional[str] = ..., experiment: _Optional[str] = ..., versions: _Optional[_Mapping[str, str]] = ..., known: _Optional[_Iterable[bytes]] = ..., model: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol", "run", "certificate")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    run: str
    certificate: bytes
    def __init__(self, protocol: _Optional[int] = ..., run: _Optional[str] = ..., certificate: _Optional[bytes] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("reason", "final")
    REASON_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    reason: str
    final: bool
    def __init__(self, reason: _Optional[str] = ..., final: _Optional[bool] = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("digest", "to", "op", "job", "round", "attempt", "base", "shared", "body", "shared_head", "body_head", "signature")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    SHARED_HEAD_FIELD_NUMBER: _ClassVar[int]
    BODY_HEAD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    to: str
    op: str
    job: str
    round: int
    attempt: int
    base: int
    shared: int
    body: int
    shared_head: bytes
    body_head: bytes
    signature: bytes
    def __init__(self, digest: _Optional[bytes] = ..., to: _Optional[str] = ..., op: _Optional[str] = ..., job: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., base: _Optional[int] = ..., shared: _Optional[int] = ..., body: _Optional[int] = ..., shared_head: _Optional[bytes] = ..., body_head: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Reply(_message.Message):
    __slots__ = ("digest", "answers", "round", "failed", "error", "body", "body_head", "signature")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    BODY_HEAD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    answers: str
    round: int
    failed: bool
    error: str
    body: int
    body_head: bytes
    signature: bytes
    def __init__(self, digest: _Optional[bytes] = ..., answers: _Optional[str] = ..., round: _Optional[int] = ..., failed: _Optional[bool] = ..., error: _Optional[str] = ..., body: _Optional[int] = ..., body_head: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Again(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    def __init__(self, digest: _Optional[bytes] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    def __init__(self, digest: _Optional[bytes] = ...) -> None: ...

class Over(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...
