"""The programs of the server image: the engine and the agent of a serving pod, and the gateway for clients.

They communicate over HTTP and ConfigMaps. They do not import each other.
"""
