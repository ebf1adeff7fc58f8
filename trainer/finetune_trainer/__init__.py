"""The trainer: preflight, train, evaluate, publish; the same code in a pod and on a laptop."""
