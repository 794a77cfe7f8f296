# SPDX-License-Identifier: Apache-2.0
"""Starts Synapse, LiveKit, PostgreSQL, Redis and nginx for the demo, the tests and the benchmarks.

The installed package does not contain it. Each server keeps its files in a temporary directory,
listens on 127.0.0.1 only, and ends together with the process that started it.
"""
