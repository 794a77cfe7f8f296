# SPDX-License-Identifier: Apache-2.0
"""Checks of a homeserver with workers, some of which lack the module or do not run."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from synapse_lk_jwt.check import webhooks
from testbed.check import Checker, Report
from testbed.livekit import LiveKit
from testbed.nginx import Servers, proxy
from testbed.postgres import Postgres
from testbed.redis import Redis
from testbed.service import PREFIX
from testbed.sets import Cluster, module_config, running
from testbed.synapse import Synapse

ALL = "background and the main process and worker1 have loaded the module"


def test_processes_that_have_all_loaded_the_module_are_ok(cluster: Cluster) -> None:
    checker = Checker(cluster.synapse)
    for names in (["homeserver.json"], ["homeserver.json", "worker1.json"]):
        report = checker.run_on(names)
        assert report.the("ok", "processes").text == ALL
        assert report.the("ok", "webhooks")


def test_worker_that_does_not_run_is_a_warning(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "WEBHOOK_SEC", 1)
    checker, worker = Checker(cluster.synapse), cluster.synapse.workers["worker1"]
    worker.stop()
    report = checker.run()
    assert "worker1 does not answer at http://127.0.0.1:" in report.the("warning", "processes").text
    # LiveKit sends its webhooks to this one.
    assert "do not arrive" in report.the("wrong", "webhooks").text
    worker.start()
    worker.wait_until(
        lambda: checker.run().all("ok", "processes") != [], "the worker in the report"
    )


@dataclass(frozen=True)
class Partial:
    """A homeserver with the module on some processes, and nginx in front of it.

    nginx has one server that passes `/_matrix` on to the worker and all else to the main process,
    and one for the other way round.
    """

    synapse: Synapse
    nginx: Servers
    checker: Checker

    def check(self, matrix_on: str, *names: str) -> Report:
        """Check with the server that passes `/_matrix` on to a process."""
        first = self.checker.write({"public_baseurl": self.nginx.url(matrix_on)})
        return self.checker.run_on([first, *names])

    def restart(self, *without_module: str) -> None:
        self.synapse.without_module = without_module
        self.synapse.restart()


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Partial]:
    directory = tmp_path_factory.mktemp("partial")
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
        nginx = Servers(synapse.directory, servers, synapse.directory)
        livekit.webhook_urls = [f"{main}{PREFIX}/sfu_webhook", f"{worker}{PREFIX}/sfu_webhook"]
        env = {"SSL_CERT_FILE": str(synapse.directory / "tls.crt")}
        with running(livekit, nginx):
            yield Partial(synapse, nginx, Checker(synapse, env=env))
        synapse.stop()


def test_workers_without_the_module_are_wrong(partial: Partial) -> None:
    partial.restart("worker1", "background")
    report = partial.check("worker")
    texts = [finding.text for finding in report.all("wrong", "processes")]
    assert len(texts) == 2, str(report)
    assert texts[0].startswith("worker1 at http://127.0.0.1:")
    assert texts[1].startswith("background at http://127.0.0.1:")
    assert all("has not loaded the module" in text for text in texts)
    assert "background runs the background tasks" not in texts[0]
    assert "Delayed leave events are not being restarted" in texts[1]
    for finding in report.all("wrong", "processes"):
        (block,) = finding.pasted["modules"]
        assert block["module"] == "synapse_lk_jwt.LiveKitJwtModule"
    # Whether /versions shows it depends on the version of Synapse.
    (check,) = {"/versions", "/rtc/transports"} & report.bad.keys()
    assert "the proxy forwards to has not loaded the" in report.the("wrong", check).text
    assert "modules" in report.the("wrong", check).pasted
    assert "MSC4195" in report.skipped
    assert report.the("ok", "service")
    assert report.the("ok", "webhooks")
    report = partial.check("main")
    assert "is answered with 404 M_UNRECOGNIZED" in report.the("wrong", "service").text
    assert [finding.verdict for finding in report.findings if finding.check == "MSC4195"] == ["ok"]


def test_main_process_without_the_module_is_wrong(partial: Partial) -> None:
    partial.restart("main")
    report = partial.check("main")
    assert "is not in the configuration" in report.the("wrong", "module").text
    report = partial.check("main", "worker1.json")
    text = report.the("wrong", "processes").text
    assert text.startswith("the main process at http://127.0.0.1:")
    assert "has not loaded the module" in text
    assert {"/versions", "/rtc/transports"} & report.bad.keys()
    assert "MSC4195" in report.skipped
    assert report.the("ok", "service")


def test_main_process_that_does_not_run_is_a_warning_where_workers_answer(partial: Partial) -> None:
    partial.restart()
    partial.synapse.main.stop()
    report = partial.check("worker")
    assert "the main process does not answer" in report.the("warning", "processes").text
    # A worker knows what LiveKit sends to it.
    assert report.the("ok", "webhooks")
    assert report.the("wrong", "service")
