# SPDX-License-Identifier: Apache-2.0
"""`python -m synapse_lk_jwt check`: what is wrong with a set-up, and what to write instead."""

import argparse
import asyncio
import logging
import os
import re
import sys
import time
from collections.abc import Sequence

from synapse_lk_jwt.check import settings
from synapse_lk_jwt.check.person import Person
from synapse_lk_jwt.check.probe import HttpProbe, NoAnswer
from synapse_lk_jwt.check.public import Public
from synapse_lk_jwt.check.report import Finding, as_json, as_text, is_all_well, warning
from synapse_lk_jwt.check.running import NoModuleThere, Running, check_webhooks
from synapse_lk_jwt.check.setup import CannotRun, NoModule, Setup, read
from synapse_lk_jwt.check.sfu import ACCESS_RULE, Sfu
from synapse_lk_jwt.identifiers import is_room_id, is_user_id

_HOST = r"(\[[^\]]+\]|[^:\[\]]+)"

ALL_WELL, TO_BE_FIXED, COULD_NOT_RUN = range(3)

_EPILOG = (
    "Exit status: 0 if all is well, 1 if something must be fixed, 2 if it could not run. Nothing is"
    " changed; for a second there is a LiveKit room of no call, for which LiveKit sends webhooks."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m synapse_lk_jwt", description=__doc__)
    check = parser.add_subparsers(required=True, metavar="check").add_parser(
        "check", help="find out what is wrong", description=__doc__, epilog=_EPILOG
    )
    check.add_argument(
        "-c",
        "--config-path",
        action="append",
        required=True,
        metavar="PATH",
        help="Synapse's configuration, a file or a directory, as often as for Synapse itself",
    )
    check.add_argument("--json", action="store_true", help="for machines")
    check.add_argument(
        "--as", dest="user_id", metavar="@USER:SERVER", help="only this user's way into a call"
    )
    check.add_argument("--room", metavar="!ROOM", help="the Matrix room, with --as")
    check.add_argument(
        "--connect-to",
        action="append",
        default=[],
        type=_connect_to,
        metavar="HOST:PORT:ADDRESS:PORT",
        help="connect to another address for a public name, where this machine has to take another"
        " way than clients do",
    )
    options = parser.parse_args(arguments)
    if (options.user_id is None) != (options.room is None):
        check.error("--as and --room belong together")
    if options.user_id is not None and not is_user_id(options.user_id):
        check.error("--as takes a user ID such as @alice:example.com")
    if options.room is not None and not is_room_id(options.room):
        check.error("--room takes a room ID, which begins with '!' (put it in quotes)")
    # What Synapse logs while it reads its configuration is no part of the report.
    logging.disable(logging.CRITICAL)
    try:
        findings = asyncio.run(_findings(options))
    except CannotRun as e:
        print(f"Cannot check: {e}", file=sys.stderr)
        return COULD_NOT_RUN
    print(_report(findings, options.json))
    return ALL_WELL if is_all_well(findings) else TO_BE_FIXED


async def _findings(options: argparse.Namespace) -> list[Finding]:
    try:
        setup = read(options.config_path)
    except NoModule as e:
        return [e.finding]
    probe = HttpProbe(dict(options.connect_to))
    # Synapse's way to LiveKit, which is not that of clients.
    internal = HttpProbe(dict(options.connect_to), proxy=setup.livekit_proxy)
    sfu = Sfu(internal, setup.module, _now_ms, setup.livekit_proxy)
    # Listeners are asked by address, while their certificates, if any, are for a public name.
    running = Running(HttpProbe(dict(options.connect_to), verifies=False), setup, _now_ms)
    if options.user_id is not None:
        return await _way(options.user_id, options.room, setup, sfu, running)
    findings = list(settings.check(setup))
    of_sfu = await sfu.check(setup.block)
    of_running, state = await running.check()
    findings += of_sfu + of_running
    if state is None:
        return findings
    public = Public(probe, setup, running, Sfu(probe, setup.module, _now_ms))
    if is_all_well(f for f in of_sfu if f.check != ACCESS_RULE):
        findings += await check_webhooks(sfu, running, state, public.visit)
    else:
        text = "and livekit_url cannot be told before LiveKit can be used"
        findings.append(warning("webhooks", text))
    return findings + await public.check_homeserver(state)


async def _way(
    user_id: str, room_id: str, setup: Setup, sfu: Sfu, running: Running
) -> list[Finding]:
    if running.url is None:
        raise CannotRun("this configuration has no listener to ask the running Synapse at")
    try:
        state = await running.ask_process(running.url, user_id=user_id, room_id=room_id)
    except (NoAnswer, NoModuleThere) as e:
        raise CannotRun(
            f"the running Synapse must be asked, and does not answer as it should at"
            f" {running.url}: {e}"
        ) from None
    return await Person(user_id, room_id, setup, sfu, state).way()


def _report(findings: Sequence[Finding], is_for_machines: bool) -> str:
    if is_for_machines:
        return as_json(findings)
    # A terminal of another character set shows question marks.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    return as_text(findings, coloured=sys.stdout.isatty() and "NO_COLOR" not in os.environ)


def _connect_to(text: str) -> tuple[tuple[str, int], tuple[str, int]]:
    parts = re.fullmatch(rf"{_HOST}:(\d+):{_HOST}:(\d+)", text)
    if parts is None:
        raise argparse.ArgumentTypeError("must be HOST:PORT:ADDRESS:PORT")
    host, port, address, other_port = parts.groups()
    return (host.strip("[]"), int(port)), (address.strip("[]"), int(other_port))


def _now_ms() -> int:
    return int(time.time() * 1000)
