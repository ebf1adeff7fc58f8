"""`make bench-operator`: the operator beside plain Jobs and a peer, on a real control plane with simulated kubelets."""
