# SPDX-License-Identifier: Apache-2.0
"""LiveKit, the SFU: names of rooms and participants, access tokens, and its server API."""
