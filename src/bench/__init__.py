"""finefit's bench: everything that touches a model or a machine (trace, measure, train, evaluate, report)."""
