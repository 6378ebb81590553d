"""A model of xapi: serves the XenAPI to its stock clients and runs SMAPIv1 plug-ins as xapi does.

It reaches storage through plug-in processes only and knows nothing of simsrd.
"""
