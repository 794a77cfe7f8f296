# SPDX-License-Identifier: Apache-2.0
"""Finds out what is wrong with a set-up, and what to write instead."""
