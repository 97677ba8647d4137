"""The sidecar of a serving pod: makes the adapters that the engine has loaded equal those that are wanted."""
