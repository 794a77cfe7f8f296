# SPDX-License-Identifier: Apache-2.0
"""Checks of a homeserver with workers, some of which lack the module or do not run."""

from collections.abc import Iterator

import pytest

from realparts.check import Checker
from realparts.http import http
from realparts.livekit import LiveKit
from realparts.nginx import Nginx, proxy
from realparts.postgres import Postgres
from realparts.process import MissingTool
from realparts.redis import Redis
from realparts.service import PREFIX
from realparts.sets import Cluster, module_config, running
from realparts.skips import missing_tool
from realparts.synapse import Synapse

ALL = "background and the main process and worker1 have loaded the module"


def test_all_processes_have_the_module(cluster: Cluster) -> None:
    checker = Checker(cluster.synapse)
    for names in (["homeserver.json"], ["homeserver.json", "worker1.json"]):
        report = checker.run_on(names)
        assert report.the("ok", "processes").text == ALL
        assert report.the("ok", "webhooks")


def test_a_worker_that_does_not_run(cluster: Cluster) -> None:
    checker, worker = Checker(cluster.synapse), cluster.synapse.workers["worker1"]
    worker.stop()
    report = checker.run()
    assert "worker1 does not answer at http://127.0.0.1:" in report.the("warning", "processes").text
    # LiveKit's webhooks go to this one.
    assert "do not arrive" in report.the("wrong", "webhooks").text
    worker.start()
    worker.wait_until(
        lambda: checker.run().all("ok", "processes") != [], "the worker in the report"
    )


@pytest.fixture(scope="module")
def partial(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Synapse, dict[str, Checker]]]:
    """A homeserver, and checkers with a proxy that takes the paths to one process or another.

    One has `/_matrix` go to the worker and all else to the main process, the other one the other
    way round.
    """
    directory = tmp_path_factory.mktemp("partial")
    try:
        livekit, redis, postgres = LiveKit(directory), Redis(directory), Postgres(directory)
        with running(redis, postgres):
            synapse = Synapse(
                "w",
                directory,
                module_config(livekit),
                postgres=postgres,
                redis=redis,
                workers=1,
                background_worker=True,
            )
            main, worker = synapse.client_url, synapse.worker_urls[0]
            servers = {
                "worker": proxy(main) + proxy(worker, "/_matrix"),
                "main": proxy(worker) + proxy(main, "/_matrix"),
            }
            nginx = Nginx(synapse.directory, servers, synapse.directory)
            livekit.webhook_urls = [f"{url}{PREFIX}/sfu_webhook" for url in (main, worker)]
            env = {"SSL_CERT_FILE": str(synapse.directory / "tls.crt")}
            checkers = {name: Checker(synapse, env=env) for name in servers}
            for name, checker in checkers.items():
                checker.url = nginx.url(name)
            with running(livekit, nginx):
                yield synapse, checkers
            synapse.stop()
    except MissingTool as e:
        missing_tool(e)
