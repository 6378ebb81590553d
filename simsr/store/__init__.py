"""The store: volumes in one append-only log. `simsr.store.store` is the entrance."""
