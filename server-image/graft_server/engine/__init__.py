"""The CPU and development engine: one base model and its LoRA adapters behind vLLM's HTTP contract.

It knows nothing about Kubernetes or object storage: an adapter is a directory, a model is a directory, a client
speaks HTTP. What drives `vllm serve` on a GPU drives this engine on a CPU, errors included.
"""
