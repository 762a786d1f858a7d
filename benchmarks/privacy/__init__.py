"""What differential privacy costs in accuracy; the module __main__.py says how to run it."""
