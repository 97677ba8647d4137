"""The sidecar of a serving pod. It downloads, loads and unloads adapters until exactly the wanted ones are loaded.

It drives vLLM and Graft's own engine alike. It does not decide which adapters are wanted: the operator does.
"""
