"""The control plane: what operators and other programs see of the router."""
