"""The FUSE face: every VDI a file (docs/fuse.md). An adapter like `nbd_export`: requests in, calls of an attached disk out.

Without I/O: `names`, `nodes`, `tree`. With: `operations` (pyfuse3's handlers), `turns` (its event loop), `mounting`, `session`.
"""
