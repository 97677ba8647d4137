"""The serving pod and the front door: engine, agent, gateway."""
