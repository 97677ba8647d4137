"""The OpenAI-compatible gateway: it sends each request to a replica that has the model's adapter loaded."""
