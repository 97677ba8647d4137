"""What the agent does next, and what it remembers for that (PURE): actions, room on the disk, retries, reasons.

It knows neither the object store nor the engine.
"""
