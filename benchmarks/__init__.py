# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the module on a real Synapse, compared with Synapse's own requests."""
