# SPDX-License-Identifier: Apache-2.0
"""The command line: `synapse-lk-jwt check -c homeserver.yaml`, or with `python -m`."""

import sys

from synapse_lk_jwt.compat.synapse_version import unsupported_synapse


def main() -> int | str:
    """Runs the command, and returns its exit status or the reason why it cannot run."""
    if (problem := unsupported_synapse()) is not None:
        return problem
    # This import needs names that older versions of Synapse lack, so the check above precedes it.
    from synapse_lk_jwt.check import command

    return command.main()


if __name__ == "__main__":
    sys.exit(main())
