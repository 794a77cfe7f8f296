# SPDX-License-Identifier: Apache-2.0
"""Calls on real servers that are killed at random, and what must be true of them at the end."""
