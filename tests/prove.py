"""What `make prove` runs beyond `make test`: the same tests at more places, at a minute each."""

import os

import pytest

PROVING = bool(os.environ.get("PACELINE_PROVE"))
ONLY_PROVE = pytest.mark.skipif(not PROVING, reason="one of `make prove`")
