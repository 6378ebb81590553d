"""NBD for simsr: the protocol as sans-I/O cores, and a trio server around them.

``constants`` holds the numbers of the protocol and our limits, ``handshake`` negotiates options and ends with the
choice of an export. Neither knows of sockets or of the store: bytes go in, bytes come out.
"""
