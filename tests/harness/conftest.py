# SPDX-License-Identifier: Apache-2.0
import os
import warnings

import synapse_tests

from realparts.process import MissingTool

try:
    synapse_tests.make_importable()
except MissingTool as e:
    if os.environ.get("REQUIRE_REAL_PARTS") == "1":
        raise
    warnings.warn(f"Tests in Synapse's harness are skipped: {e}", stacklevel=1)
    collect_ignore_glob = ["test_*.py"]
