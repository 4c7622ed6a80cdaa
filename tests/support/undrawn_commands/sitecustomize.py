"""On ``PYTHONPATH``: ``dop-search``, whoever starts it, leaves its picture files empty."""

import sys

if sys.orig_argv[1:2] and sys.orig_argv[1].endswith("dop-search"):
    import support.without_pictures  # noqa: F401
