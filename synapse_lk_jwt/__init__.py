# SPDX-License-Identifier: Apache-2.0
"""LiveKit access tokens for Matrix users, handed out by Synapse itself."""

from importlib.metadata import version

from synapse_lk_jwt.module import LiveKitJwtModule

__all__ = ["LiveKitJwtModule", "__version__"]

__version__ = version("synapse-lk-jwt")
