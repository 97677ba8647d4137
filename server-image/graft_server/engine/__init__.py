"""The CPU and development engine: it serves one base model and its adapters with vLLM's HTTP contract.

It knows nothing about Kubernetes or object storage: a model is a directory, an adapter is a directory, clients speak
HTTP. The agent that drives `vllm serve` on a GPU also drives this engine on a CPU. Its error answers are the same too.
"""
