"""The OpenAI-compatible front door: a client's model name in, an answer from a replica that has the adapter loaded out."""
