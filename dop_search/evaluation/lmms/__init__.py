"""The bridge to lmms-eval: our models as one of its models, its tasks as our benchmarks."""
