"""`python -m mlx_codellama` and the command `mlx-codellama`."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    try:
        from mlx_codellama.cli.group import group

        group.main()
    except KeyboardInterrupt:  # so early or so late that the group did not see it
        sys.exit(130)


if __name__ == "__main__":
    main()
