// The Metal Shading Language as far as MLX's kernels and ours use it, for clang 19 and newer, C++17.
#pragma once
#include "atomic.h"
#include "matrix.h"
#include "keywords.h"
