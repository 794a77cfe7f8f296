# SPDX-License-Identifier: Apache-2.0
"""The subcommands of `python -m synapse_lk_jwt` other than `check`."""

import argparse
from typing import TYPE_CHECKING

from synapse_lk_jwt.commands import migrate, uninstall

if TYPE_CHECKING:
    Subcommands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_to(subcommands: "Subcommands") -> None:
    """Adds the subcommands to the command line.

    The function to call with the parsed arguments is in their attribute `run`. It returns the exit
    status.
    """
    uninstall.add_arguments(
        subcommands.add_parser(
            "uninstall",
            help="drop the module's tables from Synapse's database",
            description=uninstall.DESCRIPTION,
            epilog=uninstall.EPILOG,
        )
    )
    migrate.add_arguments(
        subcommands.add_parser(
            "migrate",
            help="print the configuration that replaces lk-jwt-service",
            description=migrate.DESCRIPTION,
            epilog=migrate.EPILOG,
        )
    )
