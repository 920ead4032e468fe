"""Pure decisions: no Ray, torch, NVML, clock or I/O in here."""
