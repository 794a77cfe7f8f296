# SPDX-License-Identifier: Apache-2.0
"""Starts two real Synapses that federate and a real LiveKit, and makes a call. Ends by itself."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

try:
    # These take a moment, and Ctrl-C meanwhile is no reason for a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from demo.browser import BrowserStory
    from demo.story import NotAsPromised, Story
    from testbed.element_call import find_element_call
    from testbed.process import MissingTool, ProcessDied, TimedOut
    from testbed.stage import BrowserStage, Stage

    importlib.metadata.version("synapse-lk-jwt")
except (ModuleNotFoundError, importlib.metadata.PackageNotFoundError) as e:
    sys.exit(f"✘ The Python package {e.name} is missing: pip install '.[test]'")

_Stage = TypeVar("_Stage", bound=Stage)
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    """Run the demo and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--keep",
        action="store_true",
        help="go on with the call until Ctrl-C, and print what can be tried meanwhile",
    )
    way.add_argument(
        "--browser",
        action="store_true",
        help="print links to Element Call for three people, and what they can try, until Ctrl-C",
    )
    arguments = parser.parse_args()
    # The end by `kill` or a closed terminal is as tidy as that by Ctrl-C.
    for number in _ENDING:
        signal.signal(number, signal.default_int_handler)

    directory = Path(tempfile.mkdtemp(prefix="synapse-lk-jwt-demo-"))
    try:
        if arguments.browser:
            # Asked for first: it is to be said at once that it is missing.
            find_element_call()
            with _running(BrowserStage(directory)) as stage:
                BrowserStory(stage).tell()
        else:
            with _running(Stage(directory)) as stage:
                asyncio.run(Story(stage).tell(arguments.keep))
    except KeyboardInterrupt:
        print("\nStopped.")
        status = 0 if arguments.keep or arguments.browser else 130
    except MissingTool as e:
        print(f"✘ {e}")
        status = 1
    except (NotAsPromised, ProcessDied, TimedOut) as e:
        print(f"✘ {e}\n\nThe logs are in {directory}")
        return 1
    else:
        print("\nEverything was as promised. All servers have been stopped.")
        status = 0
    shutil.rmtree(directory, ignore_errors=True)
    return status


@contextlib.contextmanager
def _running(stage: _Stage) -> Iterator[_Stage]:
    print("Starting two Synapse homeservers, A and B, and a LiveKit server …", flush=True)
    try:
        stage.start()
        yield stage
    finally:
        # It takes a moment only, and one more Ctrl-C would leave it half done.
        for number in _ENDING:
            signal.signal(number, signal.SIG_IGN)
        stage.stop()


if __name__ == "__main__":
    sys.exit(main())
