"""The benchmark: our server beside nbdkit's memory plug-in and qemu-nbd on qcow2. Run ``python -m bench --help``.

Theory. The machine is noisy (single runs move by a third), so nothing is compared across time: in every round each
workload runs on all servers one right after the other, the order changes from round to round, and what counts is the
median of the ratios within the rounds. Client, disk size and content are the same for all; no server is restarted or
given a fresh store between workloads, so a store that only shines when new is found out, and the whole table is
measured a second time after every disk has been overwritten at random twice.

``workloads`` is the table of what is measured and what is aimed at, ``fio`` runs the client, ``servers`` starts and
ends the servers, ``comparison`` measures the table, ``operations`` measures what has no peer (snapshots, the plug-in),
``report`` prints and writes ``build/bench.json``.
"""
