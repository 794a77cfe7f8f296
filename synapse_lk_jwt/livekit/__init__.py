# SPDX-License-Identifier: Apache-2.0
"""What is said to LiveKit, the SFU: names, access tokens, and its server API."""
