# SPDX-License-Identifier: Apache-2.0
"""An admin changes LiveKit's API secret while a call runs."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed import service
from testbed.call import Participant
from testbed.check import Checker
from testbed.livekit import LiveKit
from testbed.matrix import User
from testbed.member import POWER_LEVELS, enter, is_kept_out
from testbed.process import until
from testbed.sets import module_config, running
from testbed.synapse import Synapse

OLD, NEW = "the-old-secret-of-more-than-32-characters", "the-new-secret-of-more-than-32-characters"
KEYS = {"APIold": OLD, "APInew": NEW}
HOUR_MS = 3_600_000


@pytest.fixture
def livekit(tmp_path: Path) -> LiveKit:
    livekit = LiveKit(tmp_path, key="APIold", secret=OLD)
    livekit.extra_config["keys"] = KEYS
    return livekit


@pytest.fixture
def synapse(livekit: LiveKit, tmp_path: Path) -> Iterator[Synapse]:
    keys = tmp_path / "keys.yaml"
    keys.write_text("".join(f"{key}: {secret}\n" for key, secret in KEYS.items()))
    config = module_config(livekit, livekit_key="APIold", livekit_key_file=str(keys))
    del config["livekit_secret"]
    # No polls, so that only webhooks and state changes cause removals and leaves.
    config["sanity_check_interval"] = "1h"
    synapse = Synapse("k", tmp_path, config)
    livekit.webhook_urls.append(f"{synapse.client_url}{service.PREFIX}/sfu_webhook")
    with running(livekit, synapse):
        yield synapse
    log = synapse.log_text()
    assert OLD not in log
    assert NEW not in log
    assert "Traceback" not in log


async def choose(synapse: Synapse, key: str) -> None:
    assert synapse.module_config is not None
    synapse.module_config = {**synapse.module_config, "livekit_key": key}
    # On the main thread, because the processes end with the thread that started them.
    synapse.restart()


def token(user: User, room_id: str) -> str:
    body = service.get_token_body(user, room_id)
    jwt = service.post(user.client_url, "/get_token", body).ok()["jwt"]
    assert isinstance(jwt, str)
    return jwt


@pytest.mark.parametrize("webhook_key", KEYS)
def test_secret_changed_during_a_call_keeps_kick_and_leave_working(
    webhook_key: str, livekit: LiveKit, synapse: Synapse
) -> None:
    webhook: dict[str, Any] = {"api_key": webhook_key, "urls": livekit.webhook_urls}
    livekit.extra_config["webhook"] = webhook
    livekit.restart()
    alice, bob, carol = (synapse.register(name) for name in ("alice", "bob", "carol"))
    room_id = alice.create_room(invite=[bob.user_id, carol.user_id], power_levels=POWER_LEVELS)
    for user in (bob, carol):
        user.join(room_id)

    async def scenario() -> None:
        member = await enter(carol, room_id, livekit, HOUR_MS)
        old_token = token(bob, room_id)
        assert service.claims(old_token)["iss"] == "APIold"
        bobs = await Participant.join(livekit.url, old_token)

        await choose(synapse, "APInew")

        assert bobs.is_connected
        new_token = token(alice, room_id)
        assert service.claims(new_token)["iss"] == "APInew"
        alices = await Participant.join(livekit.url, new_token)
        await until(lambda: bobs.identity in alices.others, "old and new in one call")
        await bobs.publish_tone()
        assert await alices.hear(bobs.identity) > 0

        # The module recognises Bob by the owner that the old secret sealed.
        alice.kick(room_id, bob.user_id)
        await until(lambda: not bobs.is_connected, "removal of Bob", 5)
        # LiveKit still accepts the old token. The webhook of this join makes the module remove Bob.
        await is_kept_out(livekit.url, old_token)
        # The webhook of a participant with a token of the old secret makes the module send the
        # leave.
        await member.there.leave()
        await until(lambda: not member.is_in_room(alice), "Carol's leave", 5)
        await alices.leave()

    asyncio.run(scenario())
    assert "not signed with livekit_key" not in synapse.log_text()


def test_check_after_secret_changed_in_the_files_reports_that_synapse_has_another(
    livekit: LiveKit, synapse: Synapse
) -> None:
    checker = Checker(synapse)
    assert checker.run().all("ok", "processes")
    report = checker.run(module={"livekit_key": "APInew"})
    # LiveKit accepts both secrets, and Synapse was not restarted.
    assert report.the("ok", "LiveKit")
    finding = report.the("wrong", "processes")
    assert "runs with another livekit_secret than these files have" in finding.text
    assert OLD not in str(report)
    assert NEW not in str(report)


def test_check_with_webhooks_signed_by_another_pair_of_the_key_file_reports_that_they_arrive(
    livekit: LiveKit, synapse: Synapse
) -> None:
    livekit.extra_config["webhook"] = {"api_key": "APInew", "urls": livekit.webhook_urls}
    livekit.restart()
    assert Checker(synapse).run().the("ok", "webhooks")
