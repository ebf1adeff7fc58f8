"""The operator: watches FineTuneJobs and makes Kubernetes and their status agree with them."""
