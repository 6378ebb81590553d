"""The ``simsr`` command: a client of the daemon's HTTP API and nothing more.

``main`` turns outcomes into exit statuses, ``app`` is the tree of commands, ``repositories`` and ``disks`` hold the
commands that are one API call, ``transfer`` moves images in and out through qemu-img, ``captive`` runs a command
beside a daemon of its own. ``client`` speaks HTTP, ``output`` writes tables and JSON.
"""
