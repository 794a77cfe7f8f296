# SPDX-License-Identifier: Apache-2.0
"""The module's metrics, in the registry that Synapse's `metrics` listener serves.

Labels take values of small closed sets only. Nothing that a client, another server or the SFU
sends becomes a label, and no label names a user, a room or a server. This file imports nothing of
the package: a test compares the values of labels with the types that they count.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Literal, TypeVar, get_args

from prometheus_client import Counter, Gauge, Histogram
from twisted.internet.interfaces import IReactorTime

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
WebhookCause = Literal["bad_signature", "wrong_time", "wrong_body", "unreadable", "not_stored"]
LEAVE_TRIGGERS = ("webhook", "poll", "gave_up")
REMOVAL_CAUSES = ("left", "server_acl", "joined", "poll", "recheck", "identity_too_long")

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

# A request fails after ten seconds. Leaves and removals are retried for longer.
REQUEST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
ACTION_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

M = TypeVar("M", Counter, Histogram)


def _from_zero(metric: M, *values: Iterable[str]) -> M:
    """The metric with all its series at zero.

    `increase()` does not count the sample that creates a series.
    """
    for labels in product(*values):
        metric.labels(*labels)
    return metric


tokens = _from_zero(
    Counter(
        "synapse_lk_jwt_tokens_total",
        "LiveKit access tokens issued for this homeserver's SFU",
        ["endpoint", "user", "access"],
    ),
    ("sfu_get", "get_token", "client_get_token", "federation_get_token"),
    ("local", "remote"),
    ("full", "restricted"),
)
remote_tokens = Counter(
    "synapse_lk_jwt_remote_tokens_total",
    "LiveKit access tokens that other homeservers issued for users of this one",
)
refusals = _from_zero(
    Counter(
        "synapse_lk_jwt_refusals_total",
        "Requests from clients and homeservers that the module answered with an error",
        ["endpoint", "cause"],
    ),
    get_args(Endpoint),
    get_args(RefusalCause),
)

openid_lookup_seconds = _from_zero(
    Histogram(
        "synapse_lk_jwt_openid_lookup_seconds",
        "Time to verify an OpenID token, in the local database or at another homeserver",
        ["where"],
        buckets=REQUEST_BUCKETS,
    ),
    ("local", "remote"),
)
openid_failures = _from_zero(
    Counter(
        "synapse_lk_jwt_openid_failures_total",
        "OpenID tokens that were rejected",
        ["where", "cause"],
    ),
    ("local", "remote"),
    get_args(OpenIdCause),
)

sfu_request_seconds = _from_zero(
    Histogram(
        "synapse_lk_jwt_sfu_request_seconds",
        "Duration of requests to LiveKit's RoomService, failed ones included",
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
rooms_ensured = Counter(
    "synapse_lk_jwt_rooms_ensured_total",
    "Times that a LiveKit room was ensured, usually without a CreateRoom request of its own",
)

webhooks = _from_zero(
    Counter("synapse_lk_jwt_webhooks_total", "LiveKit webhooks that were processed", ["event"]),
    (*WEBHOOK_EVENTS, "other"),
)
webhooks_rejected = _from_zero(
    Counter(
        "synapse_lk_jwt_webhooks_rejected_total",
        "LiveKit webhooks that were not processed",
        ["cause"],
    ),
    get_args(WebhookCause),
)

delegations_accepted = Counter(
    "synapse_lk_jwt_delegations_accepted_total", "Delayed leaves that clients delegated"
)
# Processes that do not poll have no series.
delegations = Gauge(
    "synapse_lk_jwt_delegations",
    "Delegated delayed leaves at the last poll",
    ["phase"],
)
leaves = _from_zero(
    Counter(
        "synapse_lk_jwt_leaves_total",
        "Delayed leaves that the module decided to send, by trigger",
        ["trigger"],
    ),
    LEAVE_TRIGGERS,
)
leave_seconds = Histogram(
    "synapse_lk_jwt_leave_seconds",
    "Time from the first sign that a participant left until the leave was in the room",
    buckets=ACTION_BUCKETS,
)
leave_failures = _from_zero(
    Counter(
        "synapse_lk_jwt_leave_failures_total",
        "Delayed leaves that the room refused, or that failed and will be retried",
        ["cause"],
    ),
    ("refused", "failed"),
)

removal_seconds = _from_zero(
    Histogram(
        "synapse_lk_jwt_removal_seconds",
        "Time from the reason to remove a participant until LiveKit removed the participant",
        ["cause"],
        buckets=ACTION_BUCKETS,
    ),
    REMOVAL_CAUSES,
)

participants = Gauge(
    "synapse_lk_jwt_participants",
    "Participants in this homeserver's calls at the last poll, NaN if unknown",
)
rooms = Gauge(
    "synapse_lk_jwt_rooms",
    "LiveKit rooms of this homeserver with participants at the last poll, NaN if unknown",
)
last_poll = Gauge(
    "synapse_lk_jwt_last_poll_timestamp_seconds",
    "Unix time of the last complete poll of the SFU, 0 in processes that do not poll",
)


def set_unknown() -> None:
    """Sets the numbers of participants and rooms to NaN, because LiveKit did not answer."""
    participants.set(math.nan)
    rooms.set(math.nan)


set_unknown()


@contextmanager
def timing(histogram: Histogram, reactor: IReactorTime) -> Iterator[None]:
    """Observes the duration of a block in seconds, also if the block raises."""
    began = reactor.seconds()
    try:
        yield
    finally:
        # An admin can set the clock back during the block.
        histogram.observe(max(0.0, reactor.seconds() - began))
