"""The benchmark of the store: what an operation costs against how much is stored and how many snapshots exist.

Run ``script/bench-store --help``. Absolute times differ from machine to machine and from minute to minute; what counts are
the ratios, and those are taken within a row, from runs that followed each other, in turns where it is about speed.

``scale`` says how much is done, ``disks`` makes the disks that are measured, and each other module is some of the rows:
``operations`` (snapshot, clone, revert, delete), ``depth`` (reads below many snapshots, beside qcow2's backing chains),
``fresh`` (writes right after a snapshot, beside qcow2), ``stalls`` (writes during a checkpoint), ``recovery`` (the start after
SIGKILL, and memory, with small and huge maps) and ``amplification``. ``report`` prints and writes ``build/bench-store.json``.
"""
