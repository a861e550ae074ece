"""Snippets that Metal refuses, with what our message must say, and snippets that it takes."""

from dataclasses import dataclass

from test_metal_emulator.bodies import PARAMETERS

GRID = ", uint3 thread_position_in_grid [[thread_position_in_grid]]"
TWO = "const device float* x [[buffer(0)]], device float* y [[buffer(1)]]"
SPACES, BFLOAT = "needs an explicit address space", "implicit conversion to bfloat"
REFUSED, CONSTANT = "not supported in Metal", "must be constant"


@dataclass(frozen=True)
class Snippet:
    """A kernel's body, the text before the kernel, and its parameters."""

    body: str
    says: str = ""  # for wrong ones: a part of the message
    helper: str = ""
    parameters: str = PARAMETERS


WRONG = {
    "device to threadgroup pointer": Snippet("threadgroup float* p = y; *p = 1;", "__local float"),
    "device to thread pointer": Snippet("thread float* p = y; p[0] = 1;", "__private float"),
    "constant to device pointer": Snippet("const device float* p = &s; y[0] = *p;", "__constant"),
    "device pointer to a thread parameter": Snippet(
        "y[0] = f(x);", "no matching function", "float f(const thread float* p) { return *p; }"
    ),
    "threadgroup pointer to a device parameter": Snippet(
        "threadgroup float t[4]; y[0] = f(t);",
        "no matching function",
        "float f(const device float* p) { return *p; }",
    ),
    "write through a const pointer": Snippet("x[0] = 1;", "not assignable"),
    "write to constant": Snippet("s = 1;", "const-qualified"),
    "local pointer without address space": Snippet("float* p = y; p[0] = 1;", SPACES),
    "local reference without address space": Snippet("float& p = y[0]; p = 1;", SPACES),
    "pointer parameter without address space": Snippet(
        "y[0] = f(x);", SPACES, "float f(const float* p) { return *p; }"
    ),
    "reference parameter without address space": Snippet(
        "float a = 0; f(a); y[0] = a;", SPACES, "void f(float& p) { p = 1; }"
    ),
    "kernel pointer without address space": Snippet(
        "y[0] = 1;", "needs an address space", parameters="float* y [[buffer(0)]]" + GRID
    ),
    "kernel pointer to thread memory": Snippet(
        "y[0] = 1;", "neither device nor constant", parameters="thread float* y" + GRID
    ),
    "float to bfloat variable": Snippet("bfloat b = x[i]; y[i] = b;", BFLOAT),
    "float constant to bfloat": Snippet("bfloat b = 1.0f; y[i] = b;", BFLOAT),
    "float assigned to bfloat": Snippet("bfloat b = bfloat(0.0f); b = x[i] * 2; y[i] = b;", BFLOAT),
    "half to bfloat": Snippet("half h = 1; bfloat b = h; y[i] = b;", "bfloat"),
    "bfloat to half": Snippet("bfloat b = bfloat(1.0f); half h = b; y[i] = h;", "bfloat"),
    "float returned as bfloat": Snippet(
        "y[i] = f(x[i]);", BFLOAT, "bfloat f(float a) { return a; }"
    ),
    "half plus bfloat": Snippet("half h = 1; bfloat b = bfloat(1.0f); y[i] = h + b;", "do not mix"),
    "double": Snippet("double d = 1; y[i] = d;", REFUSED),
    "long long": Snippet("long long d = 1; y[i] = d;", REFUSED),
    "exp of int": Snippet("y[i] = metal::exp(int(i));", "ambiguous"),
    "max of int and uint": Snippet("y[i] = metal::max(int(i), i);", "ambiguous"),
    "max of int and float": Snippet("y[i] = metal::max(1, x[i]);", "ambiguous"),
    "simd_sum of long": Snippet("long v = i; y[i] = simd_sum(v);", "ambiguous"),
    "threadgroup variable in a helper": Snippet(
        "y[i] = f();",
        "only be declared in a kernel",
        "float f() { threadgroup float t[4]; return t[0]; }",
    ),
    "as_type of another size": Snippet("y[i] = as_type<half>(x[i]);", "as_type size mismatch"),
    "float4 of three": Snippet("y[i] = float4(1, 2, 3).x;", "wrong number of vector components"),
    "float4 of five": Snippet("y[i] = float4(1, 2, 3, 4, 5).x;", "number of vector components"),
    "float4 of a float3": Snippet("y[i] = float4(float3(1)).x;", "vector size mismatch"),
    "swizzle out of range": Snippet("float2 v = float2(1, 2); y[i] = v.z;", "exceeds type"),
    "std": Snippet("y[i] = std::max(1.0f, x[i]);", "std"),
    "uint3 to uint": Snippet("uint j = thread_position_in_grid; y[j] = 1;", "cannot initialize"),
    "atomic on a plain pointer": Snippet(
        "atomic_fetch_add_explicit(y, 1.0f, memory_order_relaxed);", "no matching function"
    ),
    "kernel value without attribute": Snippet(
        "y[0] = n;", "'n' has no address space and no attribute", parameters=f"{TWO}, int n{GRID}"
    ),
    "unknown attribute": Snippet(
        "y[0] = n;",
        "unknown attribute [[thread_index_in_warp]]",
        parameters=f"{TWO}, uint n [[thread_index_in_warp]]{GRID}",
    ),
    "32 buffers": Snippet(
        "a0[0] = 1;",
        "more than 31 buffer",
        parameters=", ".join(f"device float* a{k}" for k in range(32)) + GRID,
    ),
    "kernel that returns": Snippet(
        "", "a kernel must return void", "kernel float other(device float* q) { return 1; }"
    ),
    "matrix of 4 x 4": Snippet("simdgroup_matrix<float, 4, 4> m; y[i] = 1;", "only 8x8"),
    "new": Snippet("thread int* p = new int; y[i] = *p;", REFUSED),
    "virtual": Snippet("y[i] = 1;", REFUSED, "struct A { virtual float f() { return 1; } };"),
    "function pointer": Snippet(
        "float (*p)(float) = f; y[i] = p(1);", "pointers to functions", "float f(float);"
    ),
    "mutable variable of the program": Snippet("g = 1; y[i] = g;", CONSTANT, "float g;"),
    "mutable static variable": Snippet("static int n = 0; n++; y[i] = n;", CONSTANT),
    "array of variable length": Snippet("float t[i + 1]; t[0] = 1;", "constant expression"),
    "undeclared name": Snippet("y[i] = foo;", "undeclared identifier 'foo'"),
    "missing semicolon": Snippet("y[i] = 1", "expected ';'"),
    "missing bracket": Snippet("y[i] = (1;", "expected ')'"),
    "recursion": Snippet(
        "y[i] = f(3);", "recursive", "int f(int n) { return n < 2 ? 1 : n * f(n - 1); }"
    ),
    "recursion over two": Snippet(
        "y[i] = f(3);",
        "recursive",
        "int g(int n); int f(int n) { return g(n); } int g(int n) { return n < 2 ? 1 : f(n - 1); }",
    ),
    "goto": Snippet("goto a; a: y[i] = 1;", REFUSED),
    "exceptions": Snippet("try { y[i] = 1; } catch (...) {}", REFUSED),
    "printf": Snippet('printf("x"); y[i] = 1;', "undeclared identifier 'printf'"),
    "vertex as a name": Snippet("int vertex = 1; y[i] = vertex;", "a keyword in Metal"),
    "mask as a number": Snippet("y[i] = float4(float4(x[i]) < float4(1)).x;", "into a bool vector"),
    "text that is not ASCII": Snippet("y[i] = 1; // \u00d7", "not ASCII"),
}

RIGHT = {
    "OpenCL's keywords as names": Snippet(
        "float local = 1, global = 2, generic = 3, pipe = 4; "
        "y[i] = local + global + generic + pipe;"
    ),
    "literals of half and bfloat": Snippet(
        "half h = 1.5h; bfloat b = 2.0bf; y[i] = float(h) + float(b);"
    ),
    "bfloat by explicit casts": Snippet(
        "bfloat b = bfloat(x[i]); b = static_cast<bfloat>(float(b) * 2.0f); y[i] = b;"
    ),
    "swizzles and constructors": Snippet(
        "float4 v = float4(float2(1, 2), 3, 4); v.xy = v.wz; float3 w = v.xyz; y[i] = v.x + w.z;"
    ),
    "vectors by template": Snippet(
        "vec<float, 4> v = vec<float, 4>(1, 2, 3, 4); metal::vec<half, 2> h(1.0h); "
        "y[i] = v.x + h.y;"
    ),
    "vectors in memory": Snippet(
        "float4 v = *(const device float4*)(x + 4 * i); *(device float4*)(y + 4 * i) = v * s;"
    ),
    "packed vectors": Snippet("y[i] = float3(((const device packed_float3*)x)[i]).z;"),
    "lambda": Snippet("auto f = [&](float a) { return a * s; }; y[i] = f(x[i]);"),
    "constant table": Snippet("y[i] = tab[i % 4];", "", "constant float tab[4] = {1, 2, 3, 4};"),
    "constant member": Snippet(
        "y[i] = A<float>::n;",
        "",
        "template <typename T> struct A { static constexpr constant int n = 8; };",
    ),
    "struct copied from device memory": Snippet(
        "P p = q[i]; y[i] = p.a + p.b;",
        "",
        "struct P { float a; int b; };",
        "const device P* q [[buffer(0)]], device float* y [[buffer(1)]]" + GRID,
    ),
    "helper for every address space": Snippet(
        "threadgroup float t[4]; t[i % 4] = 1; threadgroup_barrier(mem_flags::mem_threadgroup); "
        "y[i] = f(x) + f(t) + f(&s);",
        "",
        "template <typename P> float f(P p) { return p[0]; }",
    ),
    "constant is const": Snippet(
        "y[i] = f(s) + g(&s);",
        "",
        "float f(constant float& p) { return p; } float g(const constant float* p) { return *p; }",
    ),
    "reference to thread memory": Snippet(
        "float a = 0; f(a); y[i] = a;", "", "void f(thread float& p) { p = 1; }"
    ),
    "reference to a pointer": Snippet(
        "const device float* p = x; f(p); y[i] = *p;",
        "",
        "void f(const device float*& p) { p += 1; }",
    ),
    "half and bfloat by explicit casts": Snippet(
        "bfloat b = static_cast<bfloat>(half(1.0h)); half h = half(b); y[i] = bfloat(h) + A()();",
        "",
        "class A { public: float operator()() const { return n; } "
        "private: constexpr static constant half n = half(2); };",
    ),
    "simdgroup matrices": Snippet(
        "simdgroup_matrix<float, 8, 8> a, b, c; simdgroup_load(a, x, 8); "
        "simdgroup_load(b, x, 8, 0, true); c = make_filled_simdgroup_matrix<float, 8, 8>(0.0f); "
        "simdgroup_multiply_accumulate(c, a, b, c); simdgroup_store(c, y, 8);"
    ),
    "atomics": Snippet(
        "atomic_fetch_add_explicit(&a[0], 1u, memory_order_relaxed);",
        parameters="device atomic<uint>* a [[buffer(0)]]" + GRID,
    ),
    "unrolled loops": Snippet(
        "float a = 0;\n#pragma clang loop unroll(full)\nfor (int j = 0; j < 4; j++) a += x[j];\n"
        "#pragma unroll\nfor (int j = 0; j < 4; j++) a += x[j];\ny[i] = a;"
    ),
    "1.0 is float": Snippet("y[i] = metal::max(x[i], 0.0) * 0.5;"),
    "fast and precise": Snippet(
        "y[i] = fast::exp(x[i]) + precise::rsqrt(x[i]) + metal::exp2(x[i]);"
    ),
    "threadgroup arrays of two dimensions": Snippet(
        "threadgroup float t[4][8], u[2]; t[i % 4][0] = 1; u[0] = 2; "
        "threadgroup float* p = &t[0][0]; "
        "threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = p[0] + u[0];"
    ),
    "select, clamp, mix": Snippet(
        "y[i] = select(x[i], 0.0f, isnan(x[i])) + clamp(x[i], 0.0f, 1.0f) + mix(1.0f, 2.0f, x[i]);"
    ),
    "vectors of bool": Snippet(
        "bool4 c = float4(x[i]) < float4(1.0f); "
        "vec<bool, 2> d; d[0] = c.x; d[1] = all(c); y[i] = d.y;"
    ),
    "kernel as a plain word": Snippet(
        "y[i] = 1;", "", "kernel void other(device float* q) { q[0] = 1; }"
    ),
    "enum, union and switch": Snippet(
        "union { float f; uint u; } v; v.f = x[i]; switch (v.u % 2) { case E: y[i] = 1; break; "
        "default: y[i] = 2; }",
        "",
        "enum { D, E };",
    ),
}
