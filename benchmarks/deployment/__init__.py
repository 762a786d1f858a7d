"""The deployment's wire beside bare gRPC and Flower's deployment: `python -m benchmarks.deployment`."""
