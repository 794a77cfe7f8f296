# SPDX-License-Identifier: Apache-2.0
"""Checks a set-up, names each problem, and shows what to write instead."""
