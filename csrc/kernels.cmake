# The plain library `mlx_codellama_cpu`: pool, BLAS forwarder and kernels, without MLX. KERNELS_LINKAGE says SHARED or
# STATIC; KERNEL_ISAS becomes the list of instruction sets.
find_package(Threads REQUIRED)
set(HERE ${CMAKE_CURRENT_LIST_DIR})

# The kernels, once per instruction set. NaN and infinity keep their meaning: no -ffast-math. Multiply-adds are written out
# (`fma` in simd/vec.h): a row's bits must not depend on which copy of a line the compiler contracts.
set(KERNEL_FLAGS -O3 -Wall -Wextra -Wno-psabi -Wno-unused-function -ffp-contract=off -fno-math-errno -fno-trapping-math)
function(add_kernels isa width)
  add_library(kernels_${isa} OBJECT ${HERE}/simd/isa.cpp)
  target_include_directories(kernels_${isa} PRIVATE ${HERE})
  target_compile_definitions(kernels_${isa} PRIVATE MCL_ISA=${isa} MCL_WIDTH=${width})
  target_compile_options(kernels_${isa} PRIVATE ${KERNEL_FLAGS} ${ARGN})
  set(KERNEL_ISAS ${KERNEL_ISAS} ${isa} PARENT_SCOPE)
  set(KERNELS ${KERNELS} $<TARGET_OBJECTS:kernels_${isa}> PARENT_SCOPE)
endfunction()
add_kernels(portable 4)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  add_kernels(avx2 8 -mavx2 -mfma -mf16c)
  set(AVX512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512)
  add_kernels(avx512 16 ${AVX512})
  add_kernels(avx512vnni 16 ${AVX512} -mavx512vnni)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")  # there, vectors of 4 floats are NEON
  add_kernels(neondot 4 -march=armv8.2-a+dotprod)
endif()

add_library(mlx_codellama_cpu ${KERNELS_LINKAGE} ${HERE}/pool/pool.cpp ${HERE}/pool/stages.cpp ${HERE}/blas/blas.cpp ${HERE}/simd/select.cpp
  ${HERE}/decoder_block/decoder_block.cpp ${HERE}/kv_attention/kv_attention.cpp ${HERE}/quant_matmul/quant_matmul.cpp ${HERE}/quant_matmul/rows_product.cpp ${KERNELS})
target_include_directories(mlx_codellama_cpu PUBLIC ${HERE})
target_compile_options(mlx_codellama_cpu PRIVATE -Wall -Wextra)
target_link_libraries(mlx_codellama_cpu PUBLIC Threads::Threads ${CMAKE_DL_LIBS})
