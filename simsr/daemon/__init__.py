"""simsrd: the daemon that holds the stores and serves them."""
