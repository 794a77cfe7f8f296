# SPDX-License-Identifier: Apache-2.0
"""How Synapse reads its configuration."""

from synapse.config._base import Config, find_config_files, read_config_files
from synapse.config.homeserver import HomeServerConfig

__all__ = ["HomeServerConfig", "find_config_files", "parse_duration", "read_config_files"]


def parse_duration(value: str | int) -> int:
    """A duration in milliseconds, from a number or a text such as `10s`.

    Raises:
        TypeError, ValueError: if it is neither.
    """
    return Config.parse_duration(value)
