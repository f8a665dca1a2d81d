"""`python3 -m llmstream_nb`: refuse an old Python in one clear line, then hand over to the command line.

This file and the package's `__init__.py` keep to syntax that old Pythons can read: they must get that far.
"""

import sys

if sys.version_info < (3, 11):
    sys.exit(
        "llmstream-nb needs Python 3.11 or newer; this is Python %d.%d. Install a newer one (https://www.python.org),"
        " then start with it, for example: python3.12 -m llmstream_nb lab" % sys.version_info[:2]
    )

try:
    from llmstream_nb.setup.cli import main
except KeyboardInterrupt:  # Ctrl-C this early, too
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
