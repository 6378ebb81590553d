#!/usr/bin/python3
# One method of simsr's SMAPIv3 plug-in; this file's name says which. The methods are in simsr_storage.py.
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(HERE)), "volume", "org.xen.xapi.storage.simsr"))
import simsr_storage  # noqa: E402

sys.exit(simsr_storage.main(__file__, sys.argv[1:]))
