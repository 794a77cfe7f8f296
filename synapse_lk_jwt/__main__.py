# SPDX-License-Identifier: Apache-2.0
"""The command line: `synapse-lk-jwt check -c homeserver.yaml`, or with `python -m`."""

import sys

from synapse_lk_jwt.compat.synapse_version import unsupported_synapse

# The exit status of each command that could not do its work.
COULD_NOT_RUN = 2


def main() -> int:
    """Runs the command and returns its exit status."""
    if (problem := unsupported_synapse()) is not None:
        print(problem, file=sys.stderr)
        return COULD_NOT_RUN
    # This import needs names that older versions of Synapse lack, so the check above precedes it.
    from synapse_lk_jwt.check import command

    return command.main()


if __name__ == "__main__":
    sys.exit(main())
