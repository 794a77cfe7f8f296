# SPDX-License-Identifier: Apache-2.0
"""Which versions of Synapse the package supports.

The wheel requires `matrix-synapse` without a version, because a requirement with one would make pip
upgrade Synapse. So the package compares the version itself. This file imports nothing of Synapse:
the other modules fail to import on a Synapse that is too old.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NoReturn

from packaging.version import Version

OLDEST_SYNAPSE = "1.140"


def unsupported_synapse() -> str | None:
    """Returns why the package cannot run with the installed Synapse and what to do, or None."""
    try:
        installed = version("matrix-synapse")
    except PackageNotFoundError:
        # Some distributions remove the metadata. The self-test still checks such a Synapse.
        if find_spec("synapse") is not None:
            return None
        return (
            f"Synapse is not installed for {sys.executable}. Run this with the Python that runs"
            " Synapse."
        )
    # The release alone: a release candidate of 1.140 has everything that 1.140 has.
    if Version(installed).release >= Version(OLDEST_SYNAPSE).release:
        return None
    return (
        f"synapse-lk-jwt needs Synapse {OLDEST_SYNAPSE} or newer, but this is Synapse {installed}."
        " Upgrade Synapse, or remove synapse_lk_jwt from `modules:` in homeserver.yaml."
    )


class UnsupportedSynapse:
    """Replaces the module on an unsupported Synapse, and stops its start with a message."""

    def __init__(self, config: Any, api: Any) -> None:
        """Synapse never calls this, because it parses the configuration first."""

    @staticmethod
    def parse_config(config: Any) -> NoReturn:  # noqa: ARG004 - Synapse passes it.
        """Stops the start of Synapse.

        Raises:
            synapse.module_api.errors.ConfigError: always; names the version that is needed.
        """
        from synapse.module_api.errors import ConfigError

        raise ConfigError(unsupported_synapse() or "")
