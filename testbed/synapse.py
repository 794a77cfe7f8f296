# SPDX-License-Identifier: Apache-2.0
"""Runs a Synapse homeserver: one process on SQLite, or several processes on PostgreSQL."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import json
import os
import secrets
import sqlite3
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from testbed import matrix
from testbed.http import http
from testbed.postgres import Postgres
from testbed.process import Process, free_port, stop_all
from testbed.redis import Redis

MODULE = "synapse_lk_jwt.LiveKitJwtModule"
_LIMITS_OFF = {"per_second": 10_000, "burst_count": 10_000}


class Synapse:
    """A homeserver. Its `server_name` is the address of its federation listener.

    Changes of `module_config`, `extra_config`, `env`, `log_level`, `tls_resources` and
    `without_module` take effect at the next start. `tls_resources` are the resources of the
    federation listener, the only one with TLS. `without_module` has the names of processes
    (`main`, `worker1`, …, `background`) that do not load the module.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        module_config: Mapping[str, Any] | None = None,
        extra_config: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        log_level: str = "INFO",
        postgres: Postgres | None = None,
        redis: Redis | None = None,
        workers: int = 0,
        background_worker: bool = False,
        host: str = "127.0.0.1",
    ) -> None:
        """
        Args:
            name: for error messages and the names of files and of the database.
            directory: the homeserver gets its own directory below this one.
            module_config: the `config` of this project's module. None leaves the module out.
            extra_config: top-level keys of `homeserver.yaml`. They replace those that are set here.
            env: environment variables for Synapse, in addition to the usual ones.
            log_level: the level of all loggers except the one for SQL.
            postgres: the server to use instead of SQLite. It must be running already.
            redis: needed for workers. It must be running when this homeserver starts.
            workers: the number of generic workers, each with a listener for clients.
            background_worker: whether background tasks run on their own worker.
            host: the name of this machine in the server name. Server ACLs compare only this part,
            so
                two homeservers need two names.
        """
        self.name = name
        self.directory = directory / name
        self.module_config = module_config
        self.extra_config = dict(extra_config or {})
        self.env = dict(env or {})
        self.log_level = log_level
        self.without_module: tuple[str, ...] = ()
        self._postgres = postgres
        self._redis = redis
        self._shared_secret = secrets.token_hex(16)
        self._replication_port = free_port()
        self._federation_port = free_port()
        self.server_name = f"{host}:{self._federation_port}"
        self.tls_resources = ["federation", "openid"]
        self.client_url = f"http://127.0.0.1:{free_port()}"

        self.directory.mkdir()
        write_certificate(self.directory)
        seed = base64.b64encode(secrets.token_bytes(32)).decode("ascii").rstrip("=")
        (self.directory / "signing.key").write_text(f"ed25519 a_{name} {seed}\n")
        if postgres is not None:
            postgres.create_database(name)

        self.main = self._process("main", "synapse.app.homeserver")
        self.worker_ports: dict[str, tuple[int, int]] = {}
        self.worker_urls: list[str] = []
        worker_names = [f"worker{number}" for number in range(1, workers + 1)]
        self._background_worker = "background" if background_worker else None
        for worker in worker_names + ["background"] * background_worker:
            client_port = free_port()
            self.worker_ports[worker] = (client_port, free_port())
            if worker != self._background_worker:
                self.worker_urls.append(f"http://127.0.0.1:{client_port}")
        self.workers = {
            worker: self._process(worker, "synapse.app.generic_worker")
            for worker in self.worker_ports
        }

    @property
    def processes(self) -> list[Process]:
        return [self.main, *self.workers.values()]

    @property
    def metrics_urls(self) -> dict[str, str]:
        """The URL of the metrics of each process, by the name of the process."""
        workers = {
            name: f"http://127.0.0.1:{port}" for name, (port, _) in self.worker_ports.items()
        }
        return {"main": self.client_url, **workers}

    def start(self) -> None:
        """Start the main process with the current settings, without waiting for it."""
        self._write_config()
        for process in self.processes:
            process.env = self._environment()
        self.main.start()

    def wait_ready(self) -> None:
        """Wait until the homeserver answers. Starts the workers, which need the main process's
        tables.

        Raises:
            ProcessDied: if a process ends, for example because of a wrong configuration.
        """
        self.main.wait_until(lambda: is_healthy(self.client_url), f"{self.name} ready")
        for worker in self.workers.values():
            worker.start()
        for name, worker in self.workers.items():
            url = f"http://127.0.0.1:{self.worker_ports[name][0]}"
            worker.wait_until(partial(is_healthy, url), f"{name} ready")

    def stop(self) -> None:
        """Stop all processes with SIGTERM."""
        stop_all(self.processes)

    def kill(self) -> None:
        """Kill all processes with SIGKILL."""
        for process in self.processes:
            process.kill()

    def restart(self) -> None:
        """Stop the homeserver, start it with the current settings, and wait for it."""
        self.stop()
        self.start()
        self.wait_ready()

    def register(self, name: str, admin: bool = False) -> matrix.User:
        """Create an account on the main process and log in to it."""
        return matrix.register(self.client_url, self._shared_secret, name, admin)

    def insert(self, table: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Insert rows, all with the same columns, into a table of its database."""
        into = f"INSERT INTO {table} ({', '.join(rows[0])}) VALUES"
        values = [tuple(row.values()) for row in rows]
        if self._postgres is not None:
            self._postgres.insert(self.name, f"{into} %s", values)
            return
        connection = sqlite3.connect(self.directory / "homeserver.db", timeout=30)
        with closing(connection), connection:
            connection.executemany(f"{into} ({', '.join('?' * len(rows[0]))})", values)

    def select(self, query: str, args: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Run a query on its SQLite database."""
        assert self._postgres is None
        connection = sqlite3.connect(self.directory / "homeserver.db", timeout=30)
        with closing(connection):
            return connection.execute(query, args).fetchall()

    def log_text(self) -> str:
        """The logs of all processes, one after the other."""
        return "".join(process.log_text() for process in self.processes)

    def _process(self, name: str, app: str) -> Process:
        config = ["-c", "homeserver.json"]
        if name != "main":
            config += ["-c", f"{name}.json"]
        return Process(
            f"Synapse {self.name} {name}",
            [sys.executable, "-m", app, *config],
            self.directory / f"{name}.log",
            # Python imports from the working directory first. This one has no checkout, so that
            # Synapse imports the installed package.
            directory=self.directory,
        )

    def _environment(self) -> dict[str, str]:
        """The environment, without variables that change how Synapse or the module behave."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("LIVEKIT_") and not name.lower().endswith("_proxy")
        }
        return {**kept, **self.env}

    def _write_config(self) -> None:
        config = self._base_config()
        config["modules"] = self._modules("main")
        if self.worker_ports:
            config.update(self._shared_worker_config())
        config.update(self.extra_config)
        self._write_json("homeserver.json", config)
        self._write_json("log.json", self._log_config())
        for worker, (client_port, replication_port) in self.worker_ports.items():
            self._write_json(
                f"{worker}.json",
                {
                    "worker_app": "synapse.app.generic_worker",
                    "worker_name": worker,
                    "worker_log_config": "log.json",
                    **({"modules": self._modules(worker)} if self.without_module else {}),
                    "worker_listeners": [
                        _listener(client_port, ["client", "metrics"]),
                        _listener(replication_port, ["replication"]),
                    ],
                },
            )

    def _modules(self, process: str) -> list[dict[str, Any]]:
        if self.module_config is None or process in self.without_module:
            return []
        return [{"module": MODULE, "config": dict(self.module_config)}]

    def _base_config(self) -> dict[str, Any]:
        listeners = [
            _listener(int(self.client_url.rpartition(":")[2]), ["client", "metrics"]),
            _listener(self._federation_port, self.tls_resources, tls=True),
        ]
        if self.worker_ports:
            listeners.append(_listener(self._replication_port, ["replication"]))
        return {
            "server_name": self.server_name,
            "public_baseurl": self.client_url,
            "report_stats": False,
            "enable_metrics": True,
            "listeners": listeners,
            "database": self._database(),
            "log_config": "log.json",
            "media_store_path": "media",
            "signing_key_path": "signing.key",
            "tls_certificate_path": "tls.crt",
            "tls_private_key_path": "tls.key",
            "registration_shared_secret": self._shared_secret,
            "macaroon_secret_key": self._shared_secret,
            "form_secret": self._shared_secret,
            "trusted_key_servers": [],
            # All homeservers are on this machine and have self-signed certificates. The block lists
            # have newer names, but Synapse does not know the newer one of the second.
            "federation_verify_certificates": False,
            "ip_range_blacklist": [],
            "federation_ip_range_blacklist": [],
            "presence": {"enabled": False},
            "bcrypt_rounds": 4,
            "max_event_delay_duration": "24h",
            "rc_message": _LIMITS_OFF,
            "rc_registration": _LIMITS_OFF,
            "rc_login": {
                "address": _LIMITS_OFF,
                "account": _LIMITS_OFF,
                "failed_attempts": _LIMITS_OFF,
            },
            "rc_joins": {"local": _LIMITS_OFF, "remote": _LIMITS_OFF},
            "rc_joins_per_room": _LIMITS_OFF,
            "rc_invites": {
                "per_room": _LIMITS_OFF,
                "per_user": _LIMITS_OFF,
                "per_issuer": _LIMITS_OFF,
            },
            "rc_room_creation": _LIMITS_OFF,
            "rc_profile": _LIMITS_OFF,
            "rc_delayed_event_mgmt": _LIMITS_OFF,
            "rc_federation": {"sleep_limit": 10_000, "reject_limit": 10_000, "concurrent": 1_000},
        }

    def _database(self) -> dict[str, Any]:
        if self._postgres is None:
            return {"name": "sqlite3", "args": {"database": "homeserver.db"}}
        connection = self._postgres.connection(self.name)
        return {"name": "psycopg2", "args": {**connection, "cp_min": 1, "cp_max": 5}}

    def _shared_worker_config(self) -> dict[str, Any]:
        assert self._redis is not None, "workers need Redis"
        shared: dict[str, Any] = {
            "redis": {"enabled": True, "host": "127.0.0.1", "port": self._redis.port},
            "worker_replication_secret": self._shared_secret,
            "instance_map": {
                "main": {"host": "127.0.0.1", "port": self._replication_port},
                **{
                    worker: {"host": "127.0.0.1", "port": replication_port}
                    for worker, (_, replication_port) in self.worker_ports.items()
                },
            },
        }
        if self._background_worker is not None:
            shared["run_background_tasks_on"] = self._background_worker
        return shared

    def _log_config(self) -> dict[str, Any]:
        form = "%(asctime)s - %(name)s - %(lineno)d - %(levelname)s - %(request)s - %(message)s"
        return {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"precise": {"format": form}},
            "handlers": {"output": {"class": "logging.StreamHandler", "formatter": "precise"}},
            "loggers": {
                # As in Synapse's example, because this logger writes access tokens at lower levels.
                "synapse.storage.SQL": {"level": "INFO"},
            },
            "root": {"level": self.log_level, "handlers": ["output"]},
        }

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        # JSON is YAML.
        (self.directory / name).write_text(json.dumps(content, indent=2))


def _listener(port: int, resources: list[str], tls: bool = False) -> dict[str, Any]:
    return {
        "port": port,
        "type": "http",
        "tls": tls,
        "bind_addresses": ["127.0.0.1"],
        # TLS ends at a proxy, where there is any.
        "x_forwarded": not tls,
        "resources": [{"names": resources, "compress": False}],
    }


def is_healthy(url: str) -> bool:
    """Whether the Synapse process at a client URL answers."""
    try:
        return http("GET", f"{url}/health", timeout=5.0).status == 200
    except (OSError, HTTPException):
        return False


def write_certificate(directory: Path, names: Sequence[str] = ()) -> None:
    """Write a self-signed certificate to `tls.crt`, and its key to `tls.key`.

    Args:
        directory: for the two files.
        names: DNS names of the certificate, in addition to 127.0.0.1.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(
            x509.SubjectAlternativeName(
                [
                    x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
                    *(x509.DNSName(dns_name) for dns_name in names),
                ]
            ),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    (directory / "tls.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (directory / "tls.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
    )
