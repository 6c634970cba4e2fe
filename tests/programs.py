"""Programs that are the system's, and not every machine has."""

import os
import shutil

import pytest


def find_program(*names: str) -> str:
    """Return the path of the first of these programs that is installed.

    Without one the test is skipped; in CI, where `.ci/run` installs them, it fails.
    """
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        end = pytest.fail if os.environ.get("CI") else pytest.skip
        end(f"not installed: {' or '.join(names)}")
    return path
