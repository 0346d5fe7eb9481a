# ruff: noqa: E501
"""Mistakes to be found in our Metal kernels: each replaces one piece of text, once, in one kernel.

`old` must stand in the kernel's header or body. The list has what goes wrong in such kernels: barriers, bounds,
lanes, masks, the online softmax, layouts, rounding and what Metal's language forbids.
"""

from __future__ import annotations

from typing import NamedTuple

LANES, TILES, MERGE, APPEND = "kv_attention_lanes", "kv_attention_tiles", "kv_attention_merge", "rope_append"
MMA = "kv_attention_mma"
LANES_SEGMENTS, TILES_SEGMENTS, MMA_SEGMENTS = (f"{name}_segments" for name in (LANES, TILES, MMA))
BARRIER = "  threadgroup_barrier(mem_flags::mem_threadgroup);\n"


class Mutant(NamedTuple):
    what: str
    kernel: str
    old: str
    new: str


MUTANTS = [
    # barriers and threadgroup memory
    Mutant("no barrier before simdgroups meet", LANES, BARRIER, "\n"),
    Mutant("a barrier for device memory only", LANES, "mem_flags::mem_threadgroup", "mem_flags::mem_device"),
    Mutant("a barrier of the simdgroup only", LANES, "threadgroup_barrier(", "simdgroup_barrier("),
    Mutant("a barrier that some threads miss", LANES, BARRIER, "  if (sg != 0) {\n" + BARRIER + "  }\n"),
    Mutant("no barrier before tiles meet", TILES, "  " + BARRIER, "\n"),
    Mutant(
        "no barrier before the next tile overwrites",
        TILES,
        "      }\n    }\n  " + BARRIER + "  }",
        "      }\n    }\n  }",
    ),
    Mutant("a simdgroup's partials in the next one's place", LANES, "sg_acc[sg][r][part", "sg_acc[sg + 1][r][part"),
    Mutant("a maximum that one lane never wrote", LANES, "if (lane == 0) {\n      sg_top", "if (lane == 40) {\n      sg_top"),
    Mutant("more threadgroup memory than there is", LANES, "sg_acc[NSG][R][D]", "sg_acc[NSG * 9][R][D]"),
    # bounds
    Mutant("tokens past the last one", LANES, "const bool inside = t < end;", "const bool inside = t <= end;"),
    Mutant("every load wanted", LANES, "const bool inside = t < end;", "const bool inside = true;"),
    Mutant("a row too long", LANES, "constexpr int W = KW + VW + KG + VG;", "constexpr int W = KW + VW + KG + VG + 1;"),
    Mutant("blocks that overlap", LANES, "(block + 1) * chunk", "(block + 2) * chunk"),
    Mutant("blocks that leave tokens out", LANES, "min(n_tokens, (block + 1) * chunk)", "min(n_tokens, (block + 1) * chunk - 1)"),
    Mutant("blocks of tiles that leave tokens out", TILES, "(block + 1) * chunk)", "(block + 1) * (chunk - 8))"),
    Mutant("a partial row never written", LANES, "part_l[at] = sum;", ""),
    Mutant("query rows past the last are written", TILES, "if (query < n_rows)", "if (query <= n_rows)"),
    Mutant("an input is written", LANES, "part_m[at] = most;", "part_m[at] = most; ((device float*)part_o)[0] = 0;"),
    Mutant("two heads in one place", LANES, "(size_t(head) * n_rows + first + r) * blocks", "(size_t(first) + r) * blocks"),
    Mutant("the capacity taken for the length", LANES, "size_t(head) * capacity", "size_t(head) * n_tokens"),
    Mutant("tokens past the last one in a tile", TILES, "const int t = t0 + 8 * u + row;", "const int t = t0 + 8 * u + row + 1;"),
    # lanes
    Mutant("one shuffle too few", LANES, "for (int d = 1; d < LPR; d *= 2)", "for (int d = 2; d < LPR; d *= 2)"),
    Mutant("a shuffle in half of the lanes", LANES, "score += simd_shuffle_xor(score, ushort(d));", "if (lane < 16) score += simd_shuffle_xor(score, ushort(d));"),
    Mutant("the group word of another slot", LANES, "slot * LPR + part * N / GS", "part * N / GS"),
    Mutant("V's group word taken from K's", LANES, "slot * LPR + KG + part", "slot * LPR + part"),
    Mutant("slots that do not meet", LANES, "for (int d = LPR; d < 32; d *= 2) {\n      sum", "for (int d = LPR; d < 16; d *= 2) {\n      sum"),
    Mutant("rows and columns of a tile exchanged", TILES, "const int row = ((lane >> 2) & 4) | ((lane >> 1) & 3);", "const int row = ((lane >> 2) & 4) | (lane & 3);"),
    Mutant("a row's lanes summed wrongly", TILES, "x += simd_shuffle_xor(x, ushort(1));", "x += simd_shuffle_xor(x, ushort(2));"),
    Mutant("the group word of another column", TILES, "(lane & 9) | ((at & 4)", "(lane & 8) | ((at & 4)"),
    # segments
    Mutant("a segment that begins a token late", LANES_SEGMENTS, "(t) < dims[6] ?", "(t) <= dims[6] ?"),
    Mutant("a segment's tokens counted from the first segment on", LANES_SEGMENTS, "((t) - dims[4 + 2 * i])", "(t)"),
    Mutant("heads of a segment by the capacity of the first", LANES_SEGMENTS, "dims[5 + 2 * i]", "capacity"),
    Mutant("two segments exchanged", LANES_SEGMENTS, "PIECE(rows_2, 2, t)", "PIECE(rows_3, 2, t)"),
    Mutant("a segment left out", LANES_SEGMENTS, "(t) < dims[14] ?", "false ?"),
    Mutant("V of tiles from the first segment", TILES_SEGMENTS, "ROW_OF(t) + KW", "rows + (base + t) * W + KW"),
    Mutant("V of products from the first segment", MMA_SEGMENTS, "ROW_OF(from) + KW", "rows + (base + from) * W + KW"),
    # softmax and mask
    Mutant("no mask", LANES, "WINDOW ? end : metal::min(end, n_tokens - n_queries + row % n_queries + 1);", "end;"),
    Mutant("a mask off by one", LANES, "row % n_queries + 1", "row % n_queries + 2"),
    Mutant("a mask by the wrong axis", LANES, "row % n_queries + 1", "row / n_queries + 1"),
    Mutant("a mask of tiles off by one", TILES, "query % n_queries + 1", "query % n_queries"),
    Mutant("old sums are not rescaled", LANES, "total[r] *= shrink;", ""),
    Mutant("old values are not rescaled", LANES, "acc[r][i] *= shrink;", ""),
    Mutant("old biases are not rescaled", TILES, "v_bias[m][g] *= shrink;", ""),
    Mutant("an infinity as the first maximum", LANES, "LOWEST = -1e30f", "LOWEST = -INFINITY"),
    Mutant("a maximum of one lane for a row", TILES, "row_max(most)", "most"),
    Mutant("blocks joined without their maxima", MERGE, "shrink * part_o", "part_o"),
    Mutant("a block left out", MERGE, "for (int b = 0; b < blocks; b++) {\n    const", "for (int b = 1; b < blocks; b++) {\n    const"),
    # window
    Mutant("a window's oldest key twice as old", LANES, "t > p - size)", "t >= p - size)"),
    Mutant("a ring's newest key once more", LANES, "t > p + ring - size ||", "t >= p + ring - size ||"),
    Mutant("sinks that are forgotten", TILES, "t < sinks ||", "false ||"),
    Mutant("a ring without an end", LANES, "place[r] < dims[6] + dims[9] ? 0 : dims[9]", "0"),
    Mutant("a ring of tiles without an end", TILES, "place[m] < dims[6] + dims[9] ? 0 : dims[9]", "0"),
    Mutant("a window by the wrong axis", TILES, "place[m] = dims[8] + query % n_queries", "place[m] = dims[8] + query / n_queries"),
    Mutant("a window that hides nothing", TILES, "(WINDOW && !in_window(", "(false && !in_window("),
    # CUDA's matrix products
    Mutant("K's values of another lane", MMA, "(4 * g + low) * KN", "(4 * g + high % 4) * KN"),
    Mutant("the group word of another token of a product", MMA, "ushort(4 * (2 * low + e) + g)", "ushort(4 * (low + 4 * e) + g)"),
    Mutant("tokens of V in another order than weights", MMA, "const int from = t0 + 8 * u + 2 * low + e;", "const int from = t0 + 8 * u + low + 4 * e;"),
    Mutant("the lower rows' weights for the upper", MMA, "O[g][j], P[0][0], P[1][0], P[0][1]", "O[g][j], P[0][0], P[0][1], P[1][0]"),
    Mutant("the lower rows not rescaled", MMA, "O[g][j][2 * h + 1] *= shrink;", ""),
    Mutant("a sum over half the lanes of a row", MMA, "return x + simd_shuffle_xor(x, ushort(2));", "return x;"),
    Mutant("a query's scale forgotten", MMA, "scale[0] * weight[u][h][e]", "weight[u][h][e]"),
    Mutant("a product's column taken for its row", MMA, "d[e] += upper * b;", "d[2 + e] += upper * b;"),
    # values
    Mutant("the query without its scale", LANES, "scale[0] * float(q", "float(q"),
    Mutant("K's bias forgotten", LANES, " + k_offset * q_sum[r]", ""),
    Mutant("V's bias forgotten", TILES, "+ offset;", ";"),
    Mutant("nibbles from the other end", LANES, "(i * BITS % 32)", "(32 - BITS - i * BITS % 32)"),
    Mutant("the halves of a group word exchanged", TILES, "v_scale = low_half(word);", "v_scale = high_half(word);"),
    Mutant("pairs loaded where rows are odd", LANES, "K_EVEN = W % 2 == 0", "K_EVEN = true"),
    # rope_append
    Mutant("a turn the wrong way", APPEND, "a * c - b * s", "a * c + b * s"),
    Mutant("values are turned too", APPEND, "if (head < H + K) {\n    if (N == 1)", "if (head < H + 2 * K) {\n    if (N == 1)"),
    Mutant("positions of another token", APPEND, "cosine[at * (D / 2) + 32", "cosine[32"),
    Mutant("codes of the unrounded scale", APPEND, "1.0f / float(low)", "float((1 << (BITS % 16)) - 1) / (most - least)"),
    Mutant("no limit of codes", APPEND, "metal::clamp(metal::rint((value - offset) * inverse), 0.0f, float((1 << (BITS % 16)) - 1))", "metal::rint((value - offset) * inverse)"),
    Mutant("codes cut instead of rounded", APPEND, "metal::rint((value", "metal::floor((value"),
    Mutant("a word short of one lane", APPEND, "for (int d = 1; d < PER_WORD; d *= 2)", "for (int d = 2; d < PER_WORD; d *= 2)"),
    Mutant("V in the place of K", APPEND, "row + KW, row + KW + VW + KG", "row, row + KW + VW + KG"),
    Mutant("groups of half the lanes", APPEND, "least = simd_min(least);", "least = metal::min(least, simd_shuffle_xor(least, ushort(1)));"),
    # language
    Mutant("a device pointer for a thread's", LANES, "load_words<KN, K_EVEN>(row + part * KN, inside, k_word)", "load_words<KN, K_EVEN>(row + part * KN, inside, part_o)"),
    Mutant("a pointer without an address space", LANES, "const device uint* row =", "const uint* row ="),
    Mutant("a double", MERGE, "float most = LOWEST", "double most = LOWEST"),
    Mutant("a name of C's library", MERGE, "fast::exp2(", "exp2f("),
    Mutant("an attribute that is none", MERGE, "threadgroup_position_in_grid.y", "threadgroups_position_in_grid.y"),
    Mutant("a write through const", MERGE, "const int blocks = dims[0];", "dims[0] = 1; const int blocks = dims[0];"),
    Mutant("min of two types", LANES, "min(n_tokens, (block + 1) * chunk)", "min(uint(n_tokens), (block + 1) * chunk)"),
]  # fmt: skip
