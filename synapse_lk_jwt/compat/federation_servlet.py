# SPDX-License-Identifier: Apache-2.0
"""The base class of servlets below `/_matrix/federation`, which checks a request's signature.

In a file of its own, because a Synapse without it still serves the module's other endpoints.
"""

from synapse.federation.transport.server._base import BaseFederationServlet

__all__ = ["BaseFederationServlet"]
