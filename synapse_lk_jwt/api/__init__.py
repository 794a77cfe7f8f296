# SPDX-License-Identifier: Apache-2.0
"""The doors: what clients and other homeservers ask for over HTTP."""
