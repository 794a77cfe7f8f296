# SPDX-License-Identifier: Apache-2.0
"""The homeserver that the module runs in: one object for each topic, without own behaviour.

Each topic has its own file in this folder. These files are the only ones that use private names of
Synapse. `self_test.py` lists these names.
"""

import sys
from collections.abc import Collection, Sequence
from shlex import quote
from typing import Any

from synapse.module_api import ModuleApi

from synapse_lk_jwt.compat.app_services import AppServices
from synapse_lk_jwt.compat.background import Background
from synapse_lk_jwt.compat.caches import Caches
from synapse_lk_jwt.compat.database import Database
from synapse_lk_jwt.compat.delayed_events import DelayedEvents, has_delayed_events
from synapse_lk_jwt.compat.discovery import Discovery
from synapse_lk_jwt.compat.events import Events
from synapse_lk_jwt.compat.federation_http import FederationHttp
from synapse_lk_jwt.compat.http_client import HttpClient
from synapse_lk_jwt.compat.rate_limits import RateLimits
from synapse_lk_jwt.compat.rooms import Rooms
from synapse_lk_jwt.compat.self_test import Feature
from synapse_lk_jwt.compat.servlets import Servlets
from synapse_lk_jwt.compat.state_changes import StateChanges
from synapse_lk_jwt.compat.users import Users


class Homeserver:
    """One process of a homeserver: its main process or a worker.

    Attributes:
        server_name: the name in its users' IDs.
        instance_name: the name of this process.
        runs_background_tasks: whether this is the one process that runs background tasks.
        is_mine: whether a user ID is one of this homeserver.
        clock: Synapse's clock. The package uses no other.
        reactor: Synapse's reactor, real or of a test harness.
        config: Synapse's configuration.
        check_command: a sentence that names the command to find the cause of a problem.
        background: runs functions outside of requests.
        caches: creates caches.
        database: runs transactions.
        delayed_events: delayed events of local users.
        discovery: what Synapse announces to clients.
        events: sends and finds events.
        federation: requests to other homeservers.
        http: requests to other services.
        rate_limits: creates rate limiters.
        rooms: Matrix rooms and their members.
        servlets: registers endpoints.
        state_changes: follows changes to the state of rooms.
        users: users and what Synapse allows them.
    """

    def __init__(self, api: ModuleApi, off: Collection[Feature] = ()) -> None:
        """
        Args:
            api: Synapse's module API.
            off: the features that are off because this Synapse lacks hooks for them.
        """
        hs = api._hs
        # Synapse's decorators for cached functions have types that mypy only understands with a
        # plugin, which Synapse does not publish. So mypy cannot compare these two with Protocols.
        store: Any = hs.get_datastores().main
        hs_with_cached: Any = hs
        self.server_name = api.server_name
        self.instance_name = hs.get_instance_name()
        self.is_mine = api.is_mine
        self.runs_background_tasks = api.should_run_background_tasks()
        self.clock = hs.get_clock()
        self.reactor = hs.get_reactor()
        self.config = hs.config
        self.check_command = _check_command(hs.config.config_files)

        app_services = AppServices(store, off)
        self.database = Database(api, store)
        self.background = Background(api, self.database.error)
        self.caches = Caches(self.clock, self.server_name)
        self.rate_limits = RateLimits(api, store, self.clock, app_services)
        self.users = Users(api, hs, store, self.database, app_services, off)
        self.rooms = Rooms(hs_with_cached, store, self.database, off)
        self.events = Events(api, hs, store)
        self.state_changes = StateChanges(hs, store, off)
        self.delayed_events = DelayedEvents(
            self.clock,
            are_enabled=Feature.DELEGATION not in off and has_delayed_events(hs.config),
        )
        self.http = HttpClient(api.http_client, hs.config)
        self.federation = FederationHttp(hs, off)
        self.servlets = Servlets(api, hs, app_services, off)
        self.discovery = Discovery(hs, off)

    def is_own_name(self, server_name: str) -> bool:
        """Whether a server name is this homeserver's. DNS ignores case, so this does too."""
        return server_name.lower() == self.server_name.lower()


def _check_command(config_files: Sequence[str]) -> str:
    files = "".join(f" -c {quote(name)}" for name in config_files)
    return f"Run '{sys.executable} -m synapse_lk_jwt check{files}'"
