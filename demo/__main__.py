# SPDX-License-Identifier: Apache-2.0
"""Makes a call between two real homeservers with a real LiveKit, and checks each step."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import shutil
import signal
import sys
import tempfile
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import TypeVar

try:
    # The imports take a second. Ctrl-C must not print a traceback meanwhile.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from demo.browser import BrowserStory
    from demo.story import Story, UnexpectedResult
    from testbed.element_call import find_element_call
    from testbed.process import MissingTool, ProcessDied, TimedOut
    from testbed.stage import BrowserStage, Stage

    importlib.metadata.version("synapse-lk-jwt")
except (ModuleNotFoundError, importlib.metadata.PackageNotFoundError) as e:
    sys.exit(f"✘ The Python package {e.name} is missing: pip install '.[test]'")

_Stage = TypeVar("_Stage", bound=Stage)
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    """Run the demo and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--keep",
        action="store_true",
        help="continue the call until Ctrl-C, and print commands and LiveKit's participants",
    )
    way.add_argument(
        "--browser",
        action="store_true",
        help="serve Element Call and print links for three users, until Ctrl-C",
    )
    arguments = parser.parse_args()
    # `kill` and a closed terminal stop the servers like Ctrl-C.
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)

    directory = Path(tempfile.mkdtemp(prefix="synapse-lk-jwt-demo-"))
    try:
        if arguments.browser:
            # Element Call comes first, so that a missing npm is reported before servers start.
            find_element_call()
            with _running(BrowserStage(directory)) as stage:
                BrowserStory(stage).run()
        else:
            with _running(Stage(directory)) as stage:
                asyncio.run(_run_until_stopped(Story(stage).run(arguments.keep)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("\nStopped.")
        status = 0 if arguments.keep or arguments.browser else 130
    except MissingTool as e:
        print(f"✘ {e}")
        status = 1
    except (UnexpectedResult, ProcessDied, TimedOut) as e:
        print(f"✘ {e}\n\nThe logs are in {directory}")
        return 1
    else:
        print("\nEvery step worked. All servers are stopped.")
        status = 0
    shutil.rmtree(directory, ignore_errors=True)
    return status


async def _run_until_stopped(story: Coroutine[None, None, None]) -> None:
    """Run the story, and cancel it at the first stop signal.

    The terminal and tox both send Ctrl-C. The second one must not interrupt the participants, who
    are leaving the call.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None

    def stop() -> None:
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, lambda: None)
        task.cancel()

    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, stop)
    await story


@contextlib.contextmanager
def _running(stage: _Stage) -> Iterator[_Stage]:
    print("Starting two Synapse homeservers, A and B, and a LiveKit server …", flush=True)
    try:
        stage.start()
        yield stage
    finally:
        # Stopping takes a second. Another Ctrl-C would leave servers running.
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        stage.stop()


if __name__ == "__main__":
    sys.exit(main())
