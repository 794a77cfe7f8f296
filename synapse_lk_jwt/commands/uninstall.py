# SPDX-License-Identifier: Apache-2.0
"""`python -m synapse_lk_jwt uninstall`: drops the module's tables from Synapse's database."""

import argparse
import sys
import time
from collections.abc import Callable

from synapse_lk_jwt.commands.database import Database, DatabaseUnavailable, connect
from synapse_lk_jwt.compat.module_database import PREFIX
from synapse_lk_jwt.process_registry import GONE_MS

DROPPED, NOT_DROPPED, COULD_NOT_RUN = range(3)

DESCRIPTION = (
    "Drops the tables of synapse-lk-jwt from Synapse's database. First remove the module's block"
    " from homeserver.yaml and restart Synapse."
)

EPILOG = (
    "Exit status: 0 if the database no longer has the module's tables, 1 if the command kept them,"
    " 2 if the database could not be used."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this subcommand."""
    parser.add_argument(
        "-c",
        "--config-path",
        action="append",
        required=True,
        metavar="PATH",
        help="Synapse's configuration, a file or a directory; repeat as for Synapse itself",
    )
    parser.add_argument("--yes", action="store_true", help="drop the tables without asking")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, ask: Callable[[str], str] = input) -> int:
    """Runs the command and returns its exit status.

    Args:
        options: the parsed arguments.
        ask: prints a question and returns the answer.
    """
    try:
        with connect(options.config_path) as database:
            try:
                return _uninstall(database, None if options.yes else ask)
            except database.error as e:
                # One line: psycopg2 adds the statement and a caret below it.
                reason = str(e).strip().split("\n")[0]
                print(
                    f"Kept the tables: the {database.name} rejected a statement: {reason}."
                    " Run this command as Synapse's user. If a lock timed out, stop Synapse first.",
                    file=sys.stderr,
                )
                return COULD_NOT_RUN
    except DatabaseUnavailable as e:
        print(f"{e}.", file=sys.stderr)
        return COULD_NOT_RUN


def _uninstall(database: Database, ask: Callable[[str], str] | None) -> int:
    tables = database.tables(PREFIX)
    if not tables:
        print(f"The {database.name} has no tables of synapse-lk-jwt. Nothing to do.")
        return DROPPED
    running = _running_processes(database, tables)
    if running:
        print(_refusal(running), file=sys.stderr)
        return NOT_DROPPED
    print(f"Tables of synapse-lk-jwt in the {database.name}:")
    for table in tables:
        ((rows,),) = database.select(f'SELECT COUNT(*) FROM "{table}"')  # noqa: S608
        print(f"  {table}: {rows} row{'' if rows == 1 else 's'}")
    if ask is not None and not _is_confirmed(ask):
        print("Kept the tables.")
        return NOT_DROPPED
    database.drop(tables)
    print(f"Dropped {len(tables)} tables. Now uninstall the package: pip uninstall synapse-lk-jwt")
    return DROPPED


def _running_processes(database: Database, tables: list[str]) -> dict[str, int]:
    """Processes that have loaded the module, with the seconds since their last heartbeat."""
    if f"{PREFIX}processes" not in tables:
        return {}
    now_ms = int(time.time() * 1000)
    rows = database.select(
        f"SELECT instance, seen_ts FROM {PREFIX}processes WHERE seen_ts > ?",  # noqa: S608
        (now_ms - GONE_MS,),
    )
    return {instance: max(0, now_ms - seen_ts) // 1000 for instance, seen_ts in rows}


def _refusal(running: dict[str, int]) -> str:
    processes = ", ".join(
        f"{name} (last heartbeat {seconds} s ago)" for name, seconds in sorted(running.items())
    )
    retry_sec = GONE_MS // 1000 - min(running.values()) + 1
    return (
        f"Kept the tables: these Synapse processes have loaded the module: {processes}.\n"
        "Remove the module's block from homeserver.yaml and restart Synapse, every worker included."
        f"\nIf you have done that, run this command again in {retry_sec} seconds: a process counts"
        f" as running for {GONE_MS // 1000} seconds after its last heartbeat."
    )


def _is_confirmed(ask: Callable[[str], str]) -> bool:
    try:
        return ask("Drop them? This cannot be undone. [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        # Without a terminal, the question gets no answer.
        print()
        return False
