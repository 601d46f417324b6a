"""finefit's planner: what fits, which configuration, at what cost; answered without a deep-learning stack."""

__version__ = "0.1.0"
