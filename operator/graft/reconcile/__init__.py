"""One file per kind: gather -> decide (pure) -> apply. Level-triggered: an event only says that it is worth a look."""
