"""The engine and the agent of the serving pod, and the gateway for clients."""
