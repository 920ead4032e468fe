"""One node: its agent, sensors, meter and what it can do."""
