"""The lint: what clang's C++ lets pass and MSL does not. Every rule is seen to find, and to leave right text alone."""

from __future__ import annotations

import mlx.core as mx
import pytest
from metal_sim import MetalError, simulated


@pytest.fixture(autouse=True)
def _simulator(needs_simulator: None) -> None:
    """On a Mac there is nothing to test here."""


def run(source: str, header: str) -> None:
    with simulated():
        kernel = mx.fast.metal_kernel(
            name="linted",
            input_names=["a"],
            output_names=["out"],
            source="const uint i = thread_position_in_grid.x;\n" + source,
            header=header + "\n",  # MLX puts the template's line right behind it
        )
        kernel(
            inputs=[mx.ones((16,))],
            template=[("T", mx.bfloat16)],
            grid=(16, 1, 1),
            threadgroup=(16, 1, 1),
            output_shapes=[(16,)],
            output_dtypes=[mx.float32],
        )


# name: (body, header, what is said)
WRONG = {
    "a local pointer": ("float x[2] = {1, 2};\nfloat* p = x; // wrong\nout[i] = p[0];", "", "without an address space"),
    "a local reference": ("float x = 1;\nconst float& p = x; // wrong\nout[i] = p;", "", "without an address space"),
    "a parameter": (
        "float x[2] = {1, 2};\nout[i] = f(x);",
        "float f(const float* p) { // wrong\n return p[0]; }",
        "without",
    ),
    "a returned reference": (
        "float x[2] = {1, 2};\nout[i] = f(x);",
        "thread float* g(thread float* p) { return p; }\nfloat& f(thread float* p) { // wrong\n return *g(p); }",
        "without an address space",
    ),
    "a member": (
        "float x[2] = {1, 2};\nS s = {x};\nout[i] = s.p[0];",
        "struct S {\n float* p; // wrong\n};",
        "without an address space",
    ),
    "a cast between spaces": (
        "float x[2] = {1, 2};\nout[i] = ((device float*)x)[0]; // wrong",
        "",
        "a cast between address spaces",
    ),
    "a space deduced into T": (
        "out[i] = f(a);",
        "template <typename U> float f(const thread U* p) { // wrong\n return p[0]; }",
        "deduced into a template's type",
    ),
    "float to bfloat": ("T x = T(1);\nx = a[i]; // wrong\nout[i] = x;", "", "implicit conversion to bfloat"),
    "float returned as bfloat": (
        "out[i] = f(a[i]);",
        "bfloat f(float x) { return x; } // wrong",
        "conversion to bfloat",
    ),
    "a lambda": ("auto f = [](float x) { return x; }; // wrong\nout[i] = f(a[i]);", "", "no such thing: LambdaExpr"),
    "recursion": (
        "out[i] = f(3);",
        "float f(int n) { return n < 2 ? 1.0f : f(n - 1) + 1.0f; } // wrong",
        "recursion: f calls itself",
    ),
    "recursion by way of another": (
        "out[i] = f(3);",
        "float g(int n); // wrong\nfloat f(int n) { return n < 2 ? 1.0f : g(n - 1); } // wrong\n"
        "float g(int n) { return f(n); }",
        "recursion: [fg] calls itself",
    ),
    "a global variable": ("out[i] = table[i % 2];", "const float table[2] = {1, 2}; // wrong", "not in the constant"),
    "long long": ("long long n = i; // wrong\nout[i] = float(n);", "", "long long"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_rule_finds_its_mistake(name: str) -> None:
    source, header, said = WRONG[name]
    with pytest.raises(MetalError, match=said) as caught:
        run(source, header)
    first = str(caught.value).split("custom_kernel_")[1]
    assert first.rstrip().endswith("// wrong"), caught.value


RIGHT = {
    "pointers of every space": (
        "threadgroup float s[16];\nthread float x[2] = {1, 2};\ns[i] = a[i];\n"
        "threadgroup_barrier(mem_flags::mem_threadgroup);\nconst device float* p = a + i;\n"
        "threadgroup float* q = s;\nthread float* r = x;\nconst constant float& c = table[1];\n"
        "out[i] = p[0] + q[i] + f(r) + c;",
        "constant float table[2] = {1, 2};\nfloat f(const thread float* p) { return p[0]; }",
    ),
    "pointers in loops and calls": (
        "float x[4];\nfor (thread float* p = x; p < x + 4; p++) *p = a[i];\nout[i] = g<2>(x, *(x + 1));",
        "template <int N> METAL_FUNC float g(const thread float (&x)[4], thread float& y) { return x[N] + y; }",
    ),
    "explicit conversions": (
        "T x = T(a[i]);\nhalf h = half(float(x));\nx = static_cast<T>(float(h));\nout[i] = x * 2 + float(x);",
        "",
    ),
    "products and references to nothing": (
        "float b = 2, c = a[i] * b, d = c&& b ? 1 : 0;\nuint m = i & 3;\nout[i] = c*d + m;",
        "",
    ),
    "one calls another": ("out[i] = f(1);", "float g(int n) { return n; }\nfloat f(int n) { return g(n) + g(n + 1); }"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_text_is_left_alone(name: str) -> None:
    run(*RIGHT[name])
