"""`python -m engine.checkpoint COMMAND ...`: see `engine.checkpoint.commands`."""

from __future__ import annotations

import sys

from engine.checkpoint.commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
