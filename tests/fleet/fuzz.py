"""Coverage-guided fuzzing of what reads frames, from the handshake on, at both ends of a stream (fuzz_targets.py).

    pip install atheris
    python -m tests.fleet.fuzz [FOLDER] [-max_total_time=600]

Inputs that reach new code are kept in FOLDER, and one that finds a fault in the working directory: give it in place of
FOLDER to see the fault again. The other options are libFuzzer's.
"""

import logging
import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-not-found, unused-ignore]

with atheris.instrument_imports(include=["fedelta.fleet", "fedelta.core.codec"], enable_loader_override=False):
    from tests.fleet.fuzz_targets import one_input, seeds


def main() -> None:
    logging.disable()
    with tempfile.TemporaryDirectory() as given:
        for number, seed in enumerate(seeds()):
            Path(given, str(number)).write_bytes(seed)
        again = any(Path(argument).is_file() for argument in sys.argv[1:])
        atheris.Setup([*sys.argv, *([] if again else [given]), "-max_len=8192"], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
