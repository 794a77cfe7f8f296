# SPDX-License-Identifier: Apache-2.0
import functools
import os
import threading
import warnings

from twisted.python.threadpool import ThreadPool

from testbed.process import MissingTool
from testbed.synapse_tests import make_importable

# Older harnesses do not stop the thread pools of every homeserver, and these would hold up the end.
setattr(ThreadPool, "threadFactory", functools.partial(threading.Thread, daemon=True))  # noqa: B010

try:
    make_importable()
except MissingTool as e:
    if os.environ.get("REQUIRE_REAL_PARTS") == "1":
        raise
    warnings.warn(f"Tests in Synapse's harness are skipped: {e}", stacklevel=1)
    collect_ignore_glob = ["test_*.py"]
