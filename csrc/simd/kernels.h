// The table of kernels, one instance per instruction set. A kernel works on one piece, on the calling thread.
#pragma once
#include <cstdint>

#include "pool/pool.h"

namespace mcl {

struct Attention;
struct AttentionGrad;
struct AttentionTask;
struct QuantMatmul;
struct QuantRows;
struct RowLayout;

struct AdamW {
  float rate, beta1, beta2, eps, decay, correct1, correct2;  // correct = 1 / (1 - beta^step)
};

struct Kernels {
  const char* name;
  int width;  // floats per vector
  // rows of n floats
  void (*rms_norm)(const float* x, const float* weight, float* y, int64_t rows, int64_t n, float eps);
  void (*rms_norm_grad)(const float* x, const float* weight, const float* dy, float* dx, float* dweight, int64_t rows,
                        int64_t n, float eps);
  void (*swiglu)(const float* gate, const float* up, float* y, int64_t n);
  void (*swiglu_grad)(const float* gate, const float* up, const float* dy, float* dgate, float* dup, int64_t n);
  void (*rope)(const float* x, const float* cosine, const float* sine, float* y, int64_t half, float sign);
  void (*cross_entropy)(const float* logits, int32_t target, int64_t n, float* loss, float* of);
  void (*cross_entropy_grad)(const float* logits, int32_t target, const float* of, float dloss, float* dlogits, int64_t n);
  void (*adamw)(const AdamW& how, float grad_scale, const float* p, const float* g, const float* m, const float* v,
                float* p_out, float* m_out, float* v_out, int64_t n);
  double (*sum_squares)(const float* x, int64_t n);
  // attention: see kv_attention/kv_attention.h
  void (*attention_few)(const Attention& s, const AttentionTask& t, float* scratch);
  void (*attention_tile)(const Attention& s, const AttentionTask& t, float* scratch);
  void (*attention_merge)(const Attention& s, const AttentionTask* t, int64_t n, float* scratch);
  void (*attention_pack)(const AttentionGrad& s, int64_t pair, int64_t slot);
  void (*attention_grad)(const AttentionGrad& s, int64_t b, int64_t kv_head, int64_t slot);
  // rope_append: see rope_append/rope_append.simd.h
  void (*append_row)(const RowLayout& f, const float* k, const float* v, const float* cosine, const float* sine,
                     uint32_t* row);
  // quant_matmul: see quant_matmul/quant_matmul.h
  bool (*quant_rows_prepare)(const QuantMatmul& s, const QuantRows& to, int64_t r);
  void (*quant_rows)(const QuantMatmul& s, const QuantRows& x, int64_t o0, int64_t o1);
  void (*quant_tile)(const QuantMatmul& s, int64_t r0, int64_t r1, int64_t o0, int64_t o1, float* scratch);
  bool (*quant_int8_rows_prepare)(const QuantMatmul& s, const QuantRows& to, int64_t r);
  void (*quant_int8_rows)(const QuantMatmul& one, const QuantMatmul& other, const QuantRows& x, int64_t a, int64_t b,
                          int64_t n);
  uint32_t (*quant_int8_tile_prepare)(const QuantMatmul& s, const QuantRows& to, int64_t b);
  void (*quant_int8_tile)(const QuantMatmul& s, const QuantRows& x, int64_t b0, int64_t b1, int64_t o0, int64_t o1,
                          float* scratch);
};

// The best table for this machine, or the one MLX_CODELLAMA_ISA names (avx512vnni, avx512, avx2, neondot, portable).
MCL_API const Kernels& kernels();

}  // namespace mcl
