# SPDX-License-Identifier: Apache-2.0
"""A real call on real servers, printed step by step: `python -m demo`."""
