"""An older release of Graft beside this one: its chart, its code, and the trainer that a test plays."""
