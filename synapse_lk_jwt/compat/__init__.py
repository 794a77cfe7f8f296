# SPDX-License-Identifier: Apache-2.0
"""Everything of Synapse that is private, one topic a file. No other folder uses it.

Protocols declare the attributes of Synapse's objects that a file uses, so that mypy compares them
with the installed Synapse. `self_test.py` compares them with the Synapse that runs.
"""
