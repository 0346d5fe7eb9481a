"""Every class of mistake that the simulator knows, on a small kernel, is found with its line, threadgroup and thread.

Each kernel is right but for the line that ends in `// wrong`, which the finding must quote. The same kernels without
their mistake are clean, or the findings would prove nothing.
"""

from __future__ import annotations

import re

import mlx.core as mx
import pytest
from metal_sim import ORDERS, MetalError, Simulation, simulated
from metal_sim.toolchain import compiler

N, GROUP = 192, 64  # three threadgroups of two simdgroups


@pytest.fixture(autouse=True)
def _simulator(needs_simulator: None) -> None:
    """On a Mac there is nothing to test here."""


def run(source: str, *, header: str = "", group: int = GROUP, outputs: int = 1, **settings: object) -> Simulation:
    """`source` over a float32 [N] → `outputs` float32 [N], findings gathered."""
    with simulated(**{"strict": False, "lint": False, "cpu_s": 5.0, **settings}) as sim:
        kernel = mx.fast.metal_kernel(
            name="seeded",
            input_names=["a", "n"],
            output_names=["out", "more"][:outputs],
            source="const uint i = thread_position_in_grid.x, t = thread_position_in_threadgroup.x;\n"
            "const uint lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;\n" + source,
            header=header,
        )
        kernel(
            inputs=[mx.arange(N, dtype=mx.float32), mx.array([N, 0, 1])],
            grid=(N, 1, 1),
            threadgroup=(group, 1, 1),
            output_shapes=[(N,)] * outputs,
            output_dtypes=[mx.float32] * outputs,
        )
    return sim


SHARED = "threadgroup float s[64];\n"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
SUM = "float x = a[i];\n"

# name: (kernel, what is found)
MISTAKES = {
    # races
    "neighbour's value without a barrier": (
        SHARED + "s[t] = a[i];\nout[i] = s[t ^ 32]; // wrong",
        r"(race: read|read) of 's' byte \d+",
    ),
    "barrier for device memory only": (
        SHARED + "s[t] = a[i];\nthreadgroup_barrier(mem_flags::mem_device);\nout[i] = s[t ^ 1]; // wrong",
        r"race: read of 's' byte \d+, which thread \d+ also writes",
    ),
    "barrier for no memory": (
        SHARED + "s[t] = a[i];\nthreadgroup_barrier(mem_flags::mem_none);\nout[i] = s[t ^ 1]; // wrong",
        "race: read of 's'",
    ),
    "simdgroup_barrier across simdgroups": (
        SHARED + "s[t] = a[i]; // wrong\nsimdgroup_barrier(mem_flags::mem_threadgroup);\nout[i] = s[t ^ 33]; // wrong",
        "race: (read|write) of 's'|read of 's'",
    ),
    "write after another thread's read": (
        SHARED + "s[t] = a[i];\n" + BARRIER + "out[i] = s[t ^ 40]; // wrong\ns[t] = 0; // wrong",
        r"race: (write of 's' byte .* also reads|read of 's' byte .* also writes), .*\(at kernel.metal:\d+\)",
    ),
    "two threads write one place": (
        SHARED + "s[t / 2] = a[i]; // wrong\n" + BARRIER + "out[i] = s[t / 2];",
        "race: write of 's' byte .* also writes",
    ),
    "two threadgroups write one place": (
        "out[i] = a[i];\nout[t] = a[i]; // wrong",
        "race: write of 'out'.* another threadgroup",
    ),
    "device memory with a barrier for threadgroup memory": (
        "out[i] = a[i];\n"
        + BARRIER
        + "const float x = out[i ^ 1]; // wrong\n"
        + BARRIER
        + "threadgroup_barrier(mem_flags::mem_device);\nout[i] = x;",
        "race: read of 'out'",
    ),
    "plain beside atomic": (
        "threadgroup atomic_uint c;\nif (t == 0) atomic_store_explicit(&c, 0u, memory_order_relaxed);\n"
        + BARRIER
        + "atomic_fetch_add_explicit(&c, 1u, memory_order_relaxed); // wrong\n"
        "out[i] = *(threadgroup uint*)&c; // wrong",
        "race: (read|write) of 'c'",
    ),
    # bounds
    "read past the end": (
        "out[i] = a[i + 1]; // wrong",
        "out of bounds of buffer 'a': read of 4 bytes at byte 768 of 768",
    ),
    "read before the start": (
        "out[i] = a[int(i) - 1]; // wrong",
        "out of bounds of buffer 'a': read of 4 bytes at byte -4",
    ),
    "write past the end": (
        "out[i] = 0;\nif (i >= 188) out[i + 4] = 0; // wrong",
        "out of bounds of buffer 'out': write of 4 bytes at byte 768 of 768",
    ),
    "threadgroup array, known extent": (
        SHARED + "s[t] = 0;\n" + BARRIER + "out[i] = s[t + 1]; // wrong",
        "out of bounds of an array: index 64",
    ),
    "threadgroup array, through a pointer": (
        SHARED + "s[t] = 0;\n" + BARRIER + "const threadgroup float* p = s + t;\nout[i] = p[2]; // wrong",
        "out of bounds in threadgroup memory: read of 4 bytes, byte 2(56|60) of 's'",
    ),
    "row of another threadgroup variable": (
        "threadgroup float s[2][32];\ns[sg][lane] = 0;\n" + BARRIER + "out[i] = s[0][t]; // wrong",
        "out of bounds of an array: index 32",
    ),
    "thread's own array": (
        "float x[4] = {0};\nx[n[0] / 48 + lane % 2] = 1; // wrong\nout[i] = x[1];",
        "out of bounds of an array",
    ),
    "thread's own array, in a function": (
        "float x[4] = {0};\nput(x, n[0] / 48); // wrong\nout[i] = x[1];",
        "out of bounds of an array",
    ),
    # alignment
    "float4 at any float": (
        "out[i] = 0;\nif (i < 9) out[i] = (*(const device float4*)(a + i)).x; // wrong",
        "misaligned",
    ),
    "two words at an odd one": (
        "out[i] = 0;\nconst device uint* word = (const device uint*)a + i;\n"
        "if (i < 9) { const uint2 v = *(const device uint2*)word; out[i] = float(v.x ^ v.y); } // wrong",
        "misaligned",
    ),
    # memory that nobody wrote, and inputs
    "uninitialised threadgroup memory": (
        SHARED + "if (t != 5) s[t] = 0;\n" + BARRIER + "out[i] = s[t]; // wrong",
        "read of 's' byte 20, which nobody has written",
    ),
    "uninitialised output": ("out[i] += a[i]; // wrong", "read of 'out' byte 0, which nobody has written"),
    "output never written": (
        "if (i != 7 && i != 8) out[i] = 0;",
        "output 'out': 8 of 768 bytes were never written, the first is byte 28",
    ),
    "input written": ("((device float*)a)[i] = 1; // wrong\nout[i] = 0;", "write to input 'a' byte 0"),
    # barriers and simdgroup operations
    "barrier that some threads never reach": (
        "out[i] = 0;\nif (sg == 0) " + BARRIER.strip() + " // wrong",
        "threadgroup_barrier reached by 32 of 64 threads",
    ),
    "barrier in a branch of lanes": (
        "out[i] = 0;\nif (lane < 7) {\n"
        + BARRIER.strip()
        + " // wrong\n} else {\nout[i] = simd_sum(1.0f); // wrong\n}",
        "while 7 wait at a threadgroup_barrier|threadgroup_barrier reached by",
    ),
    "two barriers": (
        "if (sg == 0) {\nout[i] = 0;\n"
        + BARRIER.strip()
        + " // wrong\n} else {\n"
        + BARRIER.strip()
        + " // wrong\nout[i] = 1; }",
        "different threadgroup_barriers",
    ),
    "simd_sum in a branch of lanes": (
        SUM + "if (lane < 16) {\nx = simd_sum(x); // wrong\n} else {\nx = simd_max(x); // wrong\n}\nout[i] = x;",
        "divergent control flow: 16 of 32 lanes",
    ),
    "shuffle from a lane that takes no part": (
        SUM + "if (lane < 16) x = simd_shuffle(x, 31); // wrong\nout[i] = x;",
        "a lane is read that takes no part",
    ),
    "simdgroup_matrix without all lanes": (
        "simdgroup_float8x8 m = make_filled_simdgroup_matrix(1.0f);\n"
        "if (lane != 3) simdgroup_multiply(m, m, m); // wrong\nout[i] = m.thread_elements()[0];",
        "without all 32 lanes",
    ),
    # arithmetic that C++ leaves undefined
    "division by zero": ("out[i] = float(n[0] / n[1]); // wrong", "division by zero"),
    "shift by the width": ("out[i] = float(1u << (n[0] / 6)); // wrong", "shift by 32 bits"),
    "int overflow of an index": (
        "out[i] = float(n[0] * 44739243 / 44739243); // wrong",
        "signed integer overflow in a multiplication",
    ),
    "infinity as an int": ("out[i] = float(int(1.0f / n[1])); // wrong", "integer that cannot hold it"),
    # limits
    "threadgroup memory over 32 KiB": (
        "threadgroup float big[8200]; // wrong\nbig[t] = a[i];\n" + BARRIER + "out[i] = big[t ^ 1];",
        "threadgroup memory over 32768 bytes: 32800 at 'big'",
    ),
    "recursion without end": ("out[i] = deep(n[0] + i); // wrong", "stack overflow"),
    "endless loop": (
        "float x = a[i];\nwhile (x < 1e9f) x = metal::max(x, 1.0f); // wrong\nout[i] = x;",
        "still running after",
    ),
}
HEADER = """
void put(thread float* x, int at) {
  x[at] = 1; // wrong
}
float deep(int n) { // wrong
  volatile float x[16]; x[n & 15] = n; // wrong
  return n == -7 ? 0.0f : deep(n + 1) + x[3]; // wrong
}
"""


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_where_it_is(name: str) -> None:
    source, said = MISTAKES[name]
    settings = {"cpu_s": 0.3} if name == "endless loop" else {}
    findings = run(source, header=HEADER, **settings).findings
    assert findings, name
    assert re.search(said, findings[0]), findings
    if "// wrong" in source:
        assert re.search(r"^custom_kernel_seeded\w*, kernel.metal:\d+: ", findings[0]), findings
        assert findings[0].endswith("// wrong"), findings
        assert re.search(r"first seen in threadgroup \([012], 0, 0\), thread \d+", findings[0]), findings


RIGHT = {
    "neighbours with a barrier": SHARED + "s[t] = a[i];\n" + BARRIER + "out[i] = s[t ^ 33];\n" + BARRIER + "s[t] = 0;",
    "simdgroup_barrier inside a simdgroup": SHARED
    + "s[t] = a[i];\nsimdgroup_barrier(mem_flags::mem_threadgroup);\nout[i] = s[t ^ 31];",
    "device memory with its barrier": "out[i] = a[i];\nthreadgroup_barrier(mem_flags::mem_device);\n"
    "const float x = out[i ^ 1];\nthreadgroup_barrier(mem_flags::mem_device);\nout[i] = x;",
    "atomics": "threadgroup atomic_uint c;\nif (t == 0) atomic_store_explicit(&c, 0u, memory_order_relaxed);\n"
    + BARRIER
    + "atomic_fetch_add_explicit(&c, 1u, memory_order_relaxed);\n"
    + BARRIER
    + "out[i] = float(atomic_load_explicit(&c, memory_order_relaxed));",
    "a whole simdgroup in a branch": SUM + "if (sg == 1) x = simd_sum(x);\nout[i] = x;",
    "threads that return early": "if (i >= 190) { out[i] = 0; return; }\nout[i] = simd_sum(1.0f);",
    "threadgroup memory of 32 KiB": "threadgroup float big[8192];\nbig[t] = a[i];\n" + BARRIER + "out[i] = big[t ^ 1];",
    "aligned float4": "out[i] = (*(const device float4*)(a + i / 4 * 4)).y;",
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_kernel_is_clean(name: str, order: str) -> None:
    assert run(RIGHT[name], order=order, seed=5).findings == []


def test_without_checked_mode_an_overrun_still_meets_a_guard_page() -> None:
    findings = run("out[i] = a[i + 4000]; // wrong", checked=False).findings
    assert len(findings) == 1
    assert re.search(r"out of bounds of buffer 'a': byte 16\d\d\d of 768.*\n.*// wrong$", findings[0])


def test_without_checked_mode_memory_that_nobody_wrote_is_nan() -> None:
    with simulated(checked=False):
        kernel = mx.fast.metal_kernel(
            name="lazy",
            input_names=["a"],
            output_names=["out"],
            source="threadgroup float s[4];\nif (a[0] > 1) s[0] = 0;\nout[thread_position_in_grid.x * 2] = s[0];",
        )
        (out,) = kernel(
            inputs=[mx.ones((9,))],
            grid=(2, 1, 1),
            threadgroup=(2, 1, 1),
            output_shapes=[(5,)],
            output_dtypes=[mx.float32],
        )
    assert mx.all(mx.isnan(out)).item()


def test_a_launch_beyond_metals_limits_is_refused() -> None:
    with pytest.raises(MetalError, match="threadgroup of 1025 threads"):
        run("out[i] = 0;", group=1025)
    with simulated():
        kernel = mx.fast.metal_kernel(
            name="many",
            input_names=[f"a{i}" for i in range(31)],
            output_names=["out"],
            source="out[thread_position_in_grid.x] = 0;",
        )
        with pytest.raises(MetalError, match="32 buffers"):
            kernel(
                inputs=[mx.ones((9,))] * 31,
                grid=(1, 1, 1),
                threadgroup=(1, 1, 1),
                output_shapes=[(1,)],
                output_dtypes=[mx.float32],
            )


def test_findings_are_an_error_by_default() -> None:
    with pytest.raises(MetalError, match="never written"):
        run("if (i != 7) out[i] = 0;", strict=True)


# name: (kernel, header, what clang says)
REFUSED = {
    "device pointer for a thread parameter": (
        "out[i] = first(a);",
        "float first(const thread float* p) { return p[0]; }",
        "first",
    ),
    "thread pointer for a device parameter": (
        "float x[2] = {1, 2};\nout[i] = first(x);",
        "float first(const device float* p) { return p[0]; }",
        "first",
    ),
    "threadgroup pointer for a device parameter": (
        SHARED + "s[t] = 0;\nout[i] = first(s);",
        "float first(const device float* p) { return p[0]; }",
        "first",
    ),
    "constant memory as device memory": (
        "const device int* p = n;\nout[i] = p[0];",
        "",
        "__constant|changes address space",
    ),
    "device memory by reference of a thread": ("bump(out[i]);", "void bump(thread float& x) { x += 1; }", "bump"),
    "store to an input": ("a[0] = 1;\nout[i] = 0;", "", "read-only|const"),
    "store to constant memory": ("n[0] = 1;\nout[i] = 0;", "", "read-only|const"),
    "unknown attribute": ("out[i] = thread_position_in_the_grid.x;", "", "undeclared"),
    "component past the vector": ("out[i] = thread_position_in_grid.w;", "", "vector component"),
    "double": ("double x = 1;\nout[i] = x;", "", "poisoned"),
    "std": ("out[i] = std::exp(a[i]);", "", "poisoned|undeclared"),
    "a function of libm": ("out[i] = expf(a[i]);", "", "undeclared"),
    "a header that MSL has not": ("out[i] = 0;", "#include <cmath>", "MSL has no such header"),
    "float4 from three": ("out[i] = float4(1.0f, 2.0f, 3.0f).x;", "", "wrong number of components"),
    "new": ("float* x = new float[2];\nout[i] = x[0];", "", "poisoned"),
    "min of uint and int": ("out[i] = min(i, 3);", "", "ambiguous"),
    "as_type of another size": ("out[i] = as_type<half>(a[i]);", "", "different sizes"),
    "an unknown name": ("out[i] = b[i];", "", "undeclared"),
    "a forgotten return": ("out[i] = nothing(a[i]);", "float nothing(float x) { x += 1; }", "return"),
    "uninitialised variable": ("float x;\nout[i] = x;", "", "uninitialized"),
    "bfloat as half": ("bfloat b = bfloat(a[i]);\nhalf h = b;\nout[i] = h;", "", "__bf16"),
    "half as bfloat": ("half h = half(a[i]);\nbfloat b = h;\nout[i] = b;", "", "_Float16|half"),
    "virtual": ("out[i] = 0;", "struct S { virtual float f() { return 0; } };", "poisoned"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_msl_does_not_compile(name: str) -> None:
    source, header, said = REFUSED[name]
    with pytest.raises(MetalError, match=said):
        run(source, header=header)


def test_both_compilers_are_named_by_the_same_interface() -> None:
    tools = compiler()
    assert tools.name
    assert tools.kernel
    assert tools.link
