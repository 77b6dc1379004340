"""Run the command line as ``python -m packext``."""

import sys

from packext._cli import main

if __name__ == "__main__":
    sys.exit(main())
