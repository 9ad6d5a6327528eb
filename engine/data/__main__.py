"""`python -m engine.data COMMAND ...`: see `engine.data.commands`."""

from __future__ import annotations

import sys

from engine.data.commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
