"""The API of finetune-operator: the resource, its rules, what it resolves to, and what crosses the pods' border.

Both sides import this package; it imports neither of them.
"""

GROUP = "finetune.dev"
VERSION = "v1alpha1"
