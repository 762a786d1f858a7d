"""What all tests share: no network, no deadlines, and real data where it is at hand."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Read when the Hugging Face libraries are first imported, which no test does before this.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

settings.register_profile("fedelta", deadline=None)
settings.load_profile("fedelta")

_PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """A function from a name to the file or folder in ../shared/data; it skips the test where that is not there."""

    def find(name: str) -> Path:
        path = _PROJECT.parent / "shared" / "data" / name
        if not path.exists():
            pytest.skip(f"needs {name} in {path.parents[name.count('/')]}")
        return path

    return find
