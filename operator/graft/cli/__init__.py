"""`graft`: what people run on their own machine, with their own kubeconfig."""
