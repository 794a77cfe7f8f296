# SPDX-License-Identifier: Apache-2.0
"""The HTTP endpoints for clients, other homeservers and LiveKit."""
