# SPDX-License-Identifier: Apache-2.0
"""Synapse, LiveKit, PostgreSQL and Redis on loopback, for the demo, the tests and the benchmark.

Not part of the installed package. Everything started here lives in a temporary directory, listens
on 127.0.0.1 only, and dies with the process that started it.
"""
