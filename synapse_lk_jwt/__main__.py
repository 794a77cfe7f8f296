# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m synapse_lk_jwt check -c homeserver.yaml`."""

import sys

from synapse_lk_jwt.check.command import main

if __name__ == "__main__":
    sys.exit(main())
