"""`python -m mlx_codellama` and the command `mlx-codellama`."""

from __future__ import annotations

from typing import NoReturn


def main() -> NoReturn:
    from mlx_codellama.cli.group import group

    group.main()


if __name__ == "__main__":
    main()
