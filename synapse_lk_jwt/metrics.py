# SPDX-License-Identifier: Apache-2.0
"""What is counted and timed, in the registry that Synapse's `metrics` listener serves.

Labels take values of small closed sets only. Nothing that a client, another server or the SFU
sends becomes one, and no user, room or server is named.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Literal, TypeVar, get_args

from prometheus_client import Counter, Gauge, Histogram
from twisted.internet.interfaces import IReactorTime

from synapse_lk_jwt.delegation.state_machine import Trigger

Endpoint = Literal[
    "sfu_get",
    "get_token",
    "delegate_delayed_leave",
    "client_get_token",
    "client_delegate_delayed_leave",
    "federation_get_token",
]
RefusalCause = Literal[
    "bad_request",
    "unauthorized",
    "not_in_room",
    "forbidden",
    "rate_limited",
    "other_sfu",
    "no_such_delayed_event",
    "sfu",
    "other_homeserver_refused",
    "other_homeserver_failed",
    "internal_error",
]
OpenIdCause = Literal[
    "unknown", "inactive_user", "other_user", "unreachable", "refused", "bad_answer"
]
SfuCause = Literal["no_connection", "timeout", "unauthorized", "not_livekit", "refused"]
WebhookCause = Literal["bad_signature", "wrong_time", "wrong_body", "unreadable", "not_noted"]
RemovalCause = Literal["left", "server_acl", "joined", "poll", "recheck", "identity_too_long"]

SFU_METHODS = (
    "CreateRoom",
    "ListRooms",
    "ListParticipants",
    "GetParticipant",
    "RemoveParticipant",
    "DeleteRoom",
)
# https://docs.livekit.io/home/server/webhooks/
WEBHOOK_EVENTS = (
    "room_started",
    "room_finished",
    "participant_joined",
    "participant_left",
    "participant_connection_aborted",
    "track_published",
    "track_unpublished",
    "egress_started",
    "egress_updated",
    "egress_ended",
    "ingress_started",
    "ingress_ended",
)

# What asks somebody is given ten seconds; what must happen is tried again for longer.
REQUEST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
DEED_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

M = TypeVar("M", Counter, Histogram)


def _from_zero(metric: M, *values: Iterable[str]) -> M:
    """The metric with all its series, so that the first time something happens is an increase."""
    for labels in product(*values):
        metric.labels(*labels)
    return metric


tokens = _from_zero(
    Counter(
        "synapse_lk_jwt_tokens_total",
        "LiveKit access tokens handed out for this homeserver's SFU",
        ["endpoint", "user", "access"],
    ),
    ("sfu_get", "get_token", "client_get_token", "federation_get_token"),
    ("local", "remote"),
    ("full", "restricted"),
)
remote_tokens = Counter(
    "synapse_lk_jwt_remote_tokens_total",
    "LiveKit access tokens of other homeservers' SFUs, fetched for users of this one",
)
refusals = _from_zero(
    Counter(
        "synapse_lk_jwt_refusals_total",
        "Requests that were answered with an error",
        ["endpoint", "cause"],
    ),
    get_args(Endpoint),
    get_args(RefusalCause),
)

openid_lookup_seconds = _from_zero(
    Histogram(
        "synapse_lk_jwt_openid_lookup_seconds",
        "Time to find out whose an OpenID token is, in the own database or from another homeserver",
        ["where"],
        buckets=REQUEST_BUCKETS,
    ),
    ("local", "remote"),
)
openid_failures = _from_zero(
    Counter(
        "synapse_lk_jwt_openid_failures_total",
        "OpenID tokens that were not accepted",
        ["where", "cause"],
    ),
    ("local", "remote"),
    get_args(OpenIdCause),
)

sfu_request_seconds = _from_zero(
    Histogram(
        "synapse_lk_jwt_sfu_request_seconds",
        "Time that requests to LiveKit's RoomService took, whether or not they failed",
        ["method"],
        buckets=REQUEST_BUCKETS,
    ),
    SFU_METHODS,
)
sfu_failures = _from_zero(
    Counter(
        "synapse_lk_jwt_sfu_failures_total",
        "Requests to LiveKit's RoomService that failed",
        ["method", "cause"],
    ),
    SFU_METHODS,
    get_args(SfuCause),
)
rooms_ensured = _from_zero(
    Counter(
        "synapse_lk_jwt_rooms_ensured_total",
        "How a LiveKit room was made sure of: asked, shared a request in flight, or remembered",
        ["how"],
    ),
    ("asked", "shared", "remembered"),
)

webhooks = _from_zero(
    Counter("synapse_lk_jwt_webhooks_total", "LiveKit's webhooks, verified and noted", ["event"]),
    (*WEBHOOK_EVENTS, "other"),
)
webhooks_rejected = _from_zero(
    Counter(
        "synapse_lk_jwt_webhooks_rejected_total", "Webhooks that nothing was done about", ["cause"]
    ),
    get_args(WebhookCause),
)

delegations_taken_on = Counter(
    "synapse_lk_jwt_delegations_taken_on_total", "Delayed leaves that clients have handed over"
)
# Without series where nobody polls.
delegations = Gauge(
    "synapse_lk_jwt_delegations",
    "Delayed leaves that are looked after, at the last poll",
    ["phase"],
)
leaves = _from_zero(
    Counter(
        "synapse_lk_jwt_leaves_total",
        "Delayed leaves that it was decided to send, by what made it clear",
        ["trigger"],
    ),
    [trigger.value for trigger in Trigger],
)
leave_seconds = Histogram(
    "synapse_lk_jwt_leave_seconds",
    "Time from the first sign that somebody is gone until their leave was in the room",
    buckets=DEED_BUCKETS,
)
leave_failures = _from_zero(
    Counter(
        "synapse_lk_jwt_leave_failures_total",
        "Delayed leaves that the room refused, or that failed and are tried again",
        ["cause"],
    ),
    ("refused", "failed"),
)

removal_seconds = _from_zero(
    Histogram(
        "synapse_lk_jwt_removal_seconds",
        "Time from seeing that somebody must not be in a call until LiveKit had removed them",
        ["cause"],
        buckets=DEED_BUCKETS,
    ),
    get_args(RemovalCause),
)

participants = Gauge(
    "synapse_lk_jwt_participants",
    "Participants in this homeserver's calls at the last poll, NaN where that is not known",
)
rooms = Gauge(
    "synapse_lk_jwt_rooms",
    "LiveKit rooms of this homeserver with somebody in them at the last poll, NaN likewise",
)
last_poll = Gauge(
    "synapse_lk_jwt_last_poll_timestamp_seconds",
    "When the SFU was last looked at as a whole, Unix time; 0 in processes that do not do that",
)


def nobody_knows() -> None:
    """Has the numbers of participants and rooms say that they are not known."""
    participants.set(math.nan)
    rooms.set(math.nan)


nobody_knows()


@contextmanager
def timing(histogram: Histogram, reactor: IReactorTime) -> Iterator[None]:
    """Observes how long something takes, in seconds, whether or not it fails."""
    began = reactor.seconds()
    try:
        yield
    finally:
        # The clock may be set back meanwhile.
        histogram.observe(max(0.0, reactor.seconds() - began))
