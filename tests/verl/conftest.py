"""These tests run in the environment that `make verl` sets up; elsewhere, without verl, there is nothing to compare."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("verl") else ["test_*.py"]
