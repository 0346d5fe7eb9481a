"""A repository as context: the most relevant files for the one being written, as one text within a token budget."""

from __future__ import annotations

from mlx_codellama.repository.folder import Folder, Skipped, path_inside, read_folder
from mlx_codellama.repository.packing import Packed, Piece, header, pack, pack_before

__all__ = ["Folder", "Packed", "Piece", "Skipped", "header", "pack", "pack_before", "path_inside", "read_folder"]
