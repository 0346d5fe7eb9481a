"""Build the kernels with CMake; see CMakeLists.txt. Only Linux has anything to build."""

from __future__ import annotations

import sys

from setuptools import setup

if sys.platform == "linux":
    from mlx.extension import CMakeBuild, CMakeExtension

    setup(
        ext_modules=[CMakeExtension("mlx_codellama_cpu._ext", sourcedir=".")],
        cmdclass={"build_ext": CMakeBuild},
        zip_safe=False,
    )
else:
    setup(zip_safe=False)
