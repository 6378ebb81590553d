"""Latency, failures and replay, without I/O: rules, the overlay for damaged data, traces. Begin with README.md, then `request`."""
