# SPDX-License-Identifier: Apache-2.0
"""The metrics of homeservers during and after calls, as Prometheus scrapes them."""

import asyncio
import math
from pathlib import Path

import pytest

from synapse_lk_jwt.delegation.state_machine import Phase
from testbed import service
from testbed.livekit import LiveKit
from testbed.member import POWER_LEVELS, enter
from testbed.metrics import own_samples, scrape
from testbed.process import until, wait_until
from testbed.sets import Cluster, module_config, running
from testbed.synapse import Synapse

HOUR_MS = 3_600_000


def test_metrics_of_a_call_count_from_first_token_to_its_end(tmp_path: Path) -> None:
    livekit = LiveKit(tmp_path)
    synapse = Synapse("m", tmp_path, module_config(livekit, sanity_check_interval="1s"))
    livekit.webhook_urls.append(synapse.client_url + service.PREFIX + "/sfu_webhook")

    def now() -> dict[str, float]:
        return scrape(synapse.client_url)

    async def call() -> None:
        alice, bob = synapse.register("alice"), synapse.register("bob")
        room_id = alice.create_room(preset="public_chat", power_levels=POWER_LEVELS)
        bob.join(room_id)
        body = service.get_token_body(bob, "!elsewhere:example.org")
        assert service.post(bob.client_url, "/get_token", body).status == 403
        alices = await enter(alice, room_id, livekit, HOUR_MS)
        bobs = await enter(bob, room_id, livekit, HOUR_MS)
        await until(lambda: now()["participants"] == 2, "participants")
        await until(lambda: now()['delegations{phase="connected"}'] == 2, "delegations")
        assert now()["rooms"] == 1

        await alices.there.leave()
        await until(lambda: now()["leave_seconds_count"] == 1, "leave")
        alice.kick(room_id, bob.user_id)
        await until(lambda: now()['removal_seconds_count{cause="left"}'] == 1, "removal")
        # The room rejects the leave of a user who is not joined.
        await until(lambda: now()['leave_failures_total{cause="refused"}'] == 1, "Bob's leave")
        await bobs.there.leave()
        await until(lambda: now()["participants"] == 0, "no participants")

    with running(livekit, synapse):
        # Some metrics have no value before the first poll.
        wait_until(lambda: now().keys() >= own_samples().keys(), "all series")
        at_first = now()
        asyncio.run(call())
        at_last = now()
        livekit.stop()
        wait_until(lambda: math.isnan(now()["participants"]), "an SFU that cannot be asked")
    assert at_last.keys() - at_first.keys() <= {
        f'delegations{{phase="{phase.value}"}}' for phase in Phase
    }
    expected = {
        'tokens_total{access="full",endpoint="get_token",user="local"}': 2,
        'refusals_total{cause="not_in_room",endpoint="get_token"}': 1,
        'openid_lookup_seconds_count{where="local"}': 5,
        'webhooks_total{event="participant_joined"}': 2,
        "delegations_accepted_total": 2,
        'removal_seconds_count{cause="left"}': 1,
    }
    assert {name: at_last[name] for name in expected} == expected
    assert at_last["leave_seconds_sum"] < 5

    def total(name: str) -> float:
        return sum(value for series, value in at_last.items() if series.startswith(f"{name}{{"))

    assert at_last["rooms_ensured_total"] == 2
    # A poll may notice the leave before the webhook arrives.
    assert total("leaves_total") == 2
    assert total("sfu_failures_total") == 0


@pytest.mark.parametrize("process", ["main", "worker1"])
def test_metrics_of_every_process_count_its_own_requests(process: str, cluster: Cluster) -> None:
    alice = cluster.user()
    room_id = alice.create_room()
    urls = cluster.synapse.metrics_urls
    name = 'tokens_total{access="full",endpoint="sfu_get",user="local"}'
    before = {process: scrape(url)[name] for process, url in urls.items()}
    service.post(urls[process], "/sfu/get", service.sfu_get_body(alice, room_id)).ok()
    after = {process: scrape(url)[name] for process, url in urls.items()}
    assert after == {**before, process: before[process] + 1}


def test_metrics_of_polling_process_count_participants(cluster: Cluster) -> None:
    urls = cluster.synapse.metrics_urls
    wait_until(
        lambda: scrape(urls["background"])["last_poll_timestamp_seconds"] > 0, "the first poll"
    )
    for process, url in urls.items():
        polls = process == "background"
        metrics = scrape(url)
        assert (metrics["last_poll_timestamp_seconds"] > 0) == polls
        assert math.isnan(metrics["participants"]) != polls
        assert ('delegations{phase="waiting"}' in metrics) == polls
