# SPDX-License-Identifier: Apache-2.0
"""Checks the set-up of the module, names each problem, and prints what to write instead."""

import argparse
import logging
import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version

import attr

from synapse_lk_jwt import commands
from synapse_lk_jwt.check import livekit_file, settings
from synapse_lk_jwt.check.files import CannotRun, DoesNotStart, read
from synapse_lk_jwt.check.livekit import ACCESS_RULE, LiveKitChecks
from synapse_lk_jwt.check.livekit_requests import LiveKit
from synapse_lk_jwt.check.probe import NoAnswer, Probe
from synapse_lk_jwt.check.processes import NotThisModule, ProcessChecks, Running
from synapse_lk_jwt.check.public import CHECKS, Public
from synapse_lk_jwt.check.report import (
    Finding,
    Verdict,
    as_json,
    as_text,
    has_problem,
    is_all_well,
    skipped,
)
from synapse_lk_jwt.check.setup import Setup
from synapse_lk_jwt.check.user_check import UserCheck
from synapse_lk_jwt.check.webhooks import RoomChecks
from synapse_lk_jwt.check.well_known import WellKnown
from synapse_lk_jwt.identifiers import is_room_id, is_user_id

_HOST = r"(\[[^\]]+\]|[^:\[\]]+)"

ALL_WELL, HAS_PROBLEMS, COULD_NOT_RUN = range(3)

_EPILOG = (
    "Exit status: 0 if no problem was found, 1 if one was found, 2 if nothing could be checked. The"
    " command changes no configuration. It creates a LiveKit room that belongs to no call, and"
    " deletes it within seconds. LiveKit sends webhooks for that room."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one of the commands and returns its exit status."""
    options = _parse(arguments)
    return int(options.run(options))


def _run(options: argparse.Namespace) -> int:
    # Log lines that Synapse writes while it reads its configuration are no part of the report.
    logging.disable(logging.CRITICAL)
    try:
        findings = Command(options).findings()
    except CannotRun as e:
        print(f"Cannot check: {e}", file=sys.stderr)
        return COULD_NOT_RUN
    print(_report(findings, options))
    return ALL_WELL if is_all_well(findings) else HAS_PROBLEMS


class Command:
    """One run of the checks."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options

    def findings(self) -> list[Finding]:
        """All findings, in the order in which they are printed.

        Raises:
            CannotRun: if nothing can be checked.
        """
        options = self._options
        try:
            setup = read(options.config_path)
        except DoesNotStart as e:
            return [e.finding]
        if options.user_id is not None:
            return self._trace(setup)
        findings = self._check(setup)
        file = self._livekit_file()
        return file.advise(findings) if file else findings

    def _check(self, setup: Setup) -> list[Finding]:
        outside, inside = self._probe(), self._probe(verifies=False)
        well_known = WellKnown(outside, setup)
        if not setup.has_public_baseurl:
            setup = attr.evolve(setup, base_url=well_known.base_url())
        findings = list(settings.check(setup))

        to_livekit = self._probe_to_livekit(setup)
        livekit = LiveKit(setup, _now_ms)
        if has_problem(findings, "placeholders"):
            checks = ("LiveKit", "auto_create", ACCESS_RULE)
            findings += skipped(checks, "the configuration has placeholders")
        else:
            findings += to_livekit.run(LiveKitChecks(setup, livekit, _now_ms).check())

        running = Running(inside, setup, _now_ms)
        processes = ProcessChecks(running)
        findings += processes.check()

        public = Public(outside, setup, running, livekit)
        if has_problem(findings, "LiveKit", "clocks", "placeholders"):
            findings += skipped(("livekit_url", "webhooks"), "LiveKit cannot be used")
        else:
            rooms = RoomChecks(livekit, to_livekit, running, processes.url, public)
            findings += rooms.check()

        if processes.state is None:
            return findings + skipped((*CHECKS, ".well-known"), "Synapse is not answering")
        findings += public.check(processes.state)
        if not setup.has_public_baseurl and setup.module.service_url is None:
            return findings + skipped((".well-known",), "public_baseurl is not set")
        if has_problem(findings, ".well-known"):
            cause = "homeserver.yaml names another service, see above"
            return findings + skipped((".well-known",), cause)
        has_these_settings = Verdict.OK in {f.verdict for f in findings if f.check == "settings"}
        finding = well_known.check(inside, processes.url, has_these_settings=has_these_settings)
        return [*findings, finding]

    def _trace(self, setup: Setup) -> list[Finding]:
        """The path of one user into a call."""
        running = Running(self._probe(verifies=False), setup, _now_ms)
        if running.url is None:
            raise CannotRun("this configuration has no listener where Synapse answers")
        user_id, room_id = self._options.user_id, self._options.room
        try:
            state = running.ask_process(running.url, user_id=user_id, room_id=room_id)
        except (NoAnswer, NotThisModule) as e:
            raise CannotRun(
                f"Synapse at {running.url} does not answer the question about the user: {e}. Run"
                " 'check' without --as to find the cause"
            ) from None
        livekit, probe = LiveKit(setup, _now_ms), self._probe_to_livekit(setup)
        return UserCheck(user_id, room_id, setup, livekit, probe, state).trace()

    def _probe(self, *, verifies: bool = True) -> Probe:
        """Connects directly. Listeners of Synapse have certificates for a public name, if any."""
        return Probe(dict(self._options.connect_to), verifies=verifies)

    def _probe_to_livekit(self, setup: Setup) -> Probe:
        """Connects as Synapse does, which may be through a forward proxy."""
        return Probe(dict(self._options.connect_to), proxy=setup.livekit_proxy)

    def _livekit_file(self) -> livekit_file.LiveKitFile | None:
        if self._options.livekit_config is None:
            return livekit_file.find()
        try:
            return livekit_file.read(self._options.livekit_config)
        except livekit_file.Unreadable as e:
            raise CannotRun(str(e)) from None


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="synapse-lk-jwt")
    parser.add_argument("--version", action="version", version=_version())
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_to(subcommands)
    check = subcommands.add_parser(
        "check", help="check the set-up", description=__doc__, epilog=_EPILOG
    )
    check.set_defaults(run=_run)
    check.add_argument(
        "-c",
        "--config-path",
        action="append",
        required=True,
        metavar="PATH",
        help="Synapse's configuration, a file or a directory. Repeat it as for Synapse",
    )
    check.add_argument(
        "-q", "--quiet", action="store_true", help="print only warnings, problems and the summary"
    )
    check.add_argument("--json", action="store_true", help="machine-readable output")
    check.add_argument(
        "--as", dest="user_id", metavar="@USER:SERVER", help="trace one user's path into a call"
    )
    check.add_argument("--room", metavar="!ROOM", help="the Matrix room, with --as")
    check.add_argument(
        "--livekit-config",
        metavar="PATH",
        help="LiveKit's configuration (livekit.yaml). The report leaves out lines that it has."
        f" Default: {', '.join(livekit_file.USUAL_PATHS)}",
    )
    check.add_argument(
        "--connect-to",
        action="append",
        default=[],
        type=_connect_to,
        metavar="HOST:PORT:ADDRESS:PORT",
        help="connect to this address instead of a public name, as curl does. Use it on a machine"
        " that cannot connect to its own public address",
    )
    options = parser.parse_args(arguments)
    if options.run is _run:
        _check_user_options(check, options)
    return options


def _check_user_options(check: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the command if --as and --room are wrong."""
    if (options.user_id is None) != (options.room is None):
        check.error("--as and --room must be used together")
    if options.user_id is not None and not is_user_id(options.user_id):
        check.error("--as needs a user ID such as @alice:example.com")
    if options.room is not None and not is_room_id(options.room):
        check.error("--room needs a room ID, which begins with '!' (put it in quotes)")


def _version() -> str:
    return (
        f"synapse-lk-jwt {version('synapse-lk-jwt')}, Synapse {version('matrix-synapse')}, Python"
        f" {platform.python_version()}"
    )


def _report(findings: Sequence[Finding], options: argparse.Namespace) -> str:
    if options.json:
        return as_json(findings)
    # A terminal with another character set shows question marks.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return as_text(findings, coloured=coloured, quiet=options.quiet)


def _connect_to(text: str) -> tuple[tuple[str, int], tuple[str, int]]:
    parts = re.fullmatch(rf"{_HOST}:(\d+):{_HOST}:(\d+)", text)
    if parts is None:
        raise argparse.ArgumentTypeError("must be HOST:PORT:ADDRESS:PORT")
    host, port, address, other_port = parts.groups()
    return (host.strip("[]"), int(port)), (address.strip("[]"), int(other_port))


def _now_ms() -> int:
    return int(time.time() * 1000)
