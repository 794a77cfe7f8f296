# SPDX-License-Identifier: Apache-2.0
"""What a token costs, measured on a real Synapse beside what Synapse does itself."""
