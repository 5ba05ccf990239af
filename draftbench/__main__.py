"""`python -m draftbench`, the same as the command `draftbench`."""

import os
import sys


def _drop_working_folder() -> None:
    """Forget the working folder, which `python -m` puts first on sys.path (and `python -P -m` does not).

    From the repo root our folder `kernels` would shadow the Hugging Face package that transformers looks for.
    """
    if not sys.flags.safe_path and sys.path[0] in ("", os.getcwd()):
        del sys.path[0]


if __name__ == "__main__":
    _drop_working_folder()
    from draftbench.cli import main

    sys.exit(main())
