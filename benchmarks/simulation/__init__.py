"""The simulation beside a bare PyTorch loop and beside other frameworks; `python -m benchmarks.simulation --help`."""
