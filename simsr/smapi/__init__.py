"""The SMAPIv1 face of simsr: ``SimSR``, a stand-alone script that xapi runs in dom0.

Nothing is importable here. The script beside this file uses Python 3.6 and the standard library only, and talks to
`simsrd` over its control socket, so that dom0 needs that one file and nothing else of simsr.
"""
