"""`python -m draftbench`, the same as the command `draftbench`."""

import sys

from .environment import drop_working_folder

if __name__ == "__main__":
    drop_working_folder()
    from .cli import main

    sys.exit(main())
