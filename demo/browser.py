# SPDX-License-Identifier: Apache-2.0
"""The demo in a browser: Element Call for three users, and what to try."""

from __future__ import annotations

import json
import threading
from typing import Any
from urllib.parse import quote

from demo.self_check import SelfCheck
from demo.story import print_check
from testbed.element_call import ElementCall
from testbed.matrix import User
from testbed.stage import BrowserStage


class BrowserStory:
    """Alice and Bob are users of homeserver A. Rita, a user of B, is restricted on A."""

    def __init__(self, stage: BrowserStage, **config: Any) -> None:
        """
        Args:
            stage: the running servers.
            config: more keys for Element Call's `config.json`.
        """
        self._stage = stage
        self._alice = stage.a.register("alice")
        self._bob = stage.a.register("bob")
        self._rita = stage.b.register("rita")
        self._room_id = stage.room(self._alice, self._bob, self._rita)
        # A user without a camera or a microphone can join and watch.
        features = {"feature_group_calls_without_video_and_audio": True}
        self.pages = [
            ElementCall(user, features=features, **config)
            for user in (self._alice, self._bob, self._rita)
        ]

    def run(self) -> None:
        """Serve Element Call and print what to try, until interrupted."""
        print_check(SelfCheck(self._stage.a))
        for page in self.pages:
            page.start()
        try:
            print(self.text(), flush=True)
            threading.Event().wait()
        finally:
            for page in self.pages:
                page.stop()

    def text(self) -> str:
        """The text that the demo prints."""
        alice, bob, rita = (page.link(self._room_id) for page in self.pages)
        return f"""\
✔ Two homeservers, LiveKit and Element Call are running on 127.0.0.1

Open each link in its own tab of Chromium or Chrome, and click on 'Join call':

  Alice  {alice}
  Bob    {bob}
  Rita   {rita}

Alice and Bob are users of homeserver A, which has the module and a LiveKit with
room.auto_create: false. Rita is a user of homeserver B and restricted on A.
Mute the microphones, or you hear yourself. If a page is empty or shows an error, reload it.

To try:

1. Join as Rita before the others. Element Call says that she cannot start the call.
2. Join as Alice, and reload Rita's page. Rita can join now.
3. Join as Bob, then close his tab and watch Alice's page. Bob disappears at once, because A sends
   the leave that his browser delegated. Without A, he would stay listed for an hour.
4. Open Bob's link and join again. Then let Alice kick him. A removes him from the call:

   {self._curl(self._alice, "kick", user_id=self._bob.user_id)}

   Bob can return: the room is public, and his link joins it again.

A's log has a line for each token:
  tail -f {self._stage.a.main.log} | grep --line-buffered livekit

Ctrl-C stops all servers.
"""

    def _curl(self, user: User, action: str, **body: str) -> str:
        url = f"{user.client_url}/_matrix/client/v3/rooms/{quote(self._room_id)}/{action}"
        token = f"Authorization: Bearer {user.access_token}"
        return f"curl -H '{token}' -d '{json.dumps(body)}' '{url}'"
