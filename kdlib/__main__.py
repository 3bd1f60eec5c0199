"""``python -m kdlib``: the same as the ``kdlib`` command, for accelerate launch and torchrun."""

import sys

from kdlib.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
