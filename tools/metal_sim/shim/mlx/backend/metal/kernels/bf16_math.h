// Stands in for MLX's header of this name, which reaches into Apple's compiler: math.h and simdgroup.h know bfloat.
#pragma once
