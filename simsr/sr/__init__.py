"""The model: repositories and their VDIs, what may be done with them and when."""
