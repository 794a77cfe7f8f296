# SPDX-License-Identifier: Apache-2.0
"""LiveKit access tokens for Matrix users, issued by Synapse itself."""

from importlib.metadata import version
from typing import TYPE_CHECKING

from synapse_lk_jwt.compat.synapse_version import unsupported_synapse

if TYPE_CHECKING or unsupported_synapse() is None:
    from synapse_lk_jwt.module import LiveKitJwtModule
else:
    from synapse_lk_jwt.compat.synapse_version import UnsupportedSynapse as LiveKitJwtModule

__all__ = ["LiveKitJwtModule", "__version__"]

__version__ = version("synapse-lk-jwt")
