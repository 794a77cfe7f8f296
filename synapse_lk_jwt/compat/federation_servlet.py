# SPDX-License-Identifier: Apache-2.0
"""The base class of servlets below `/_matrix/federation`, which checks a request's signature.

This file is separate because a Synapse without the class still serves the other endpoints.
"""

from synapse.federation.transport.server._base import BaseFederationServlet

__all__ = ["BaseFederationServlet"]
