// Metal's library in C++ for OpenCL, precompiled ahead of every kernel.
#pragma once
#pragma clang system_header
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#include "operations.h"
#define MSL_INLINE inline __attribute__((always_inline))
#define MSL_EACH_INTEGER(X) X(char) X(uchar) X(short) X(ushort) X(int) X(uint) X(long) X(ulong)
#define MSL_EACH_SMALL_INTEGER(X) X(char) X(uchar) X(short) X(ushort) X(int) X(uint)
#define MSL_EACH_FLOAT(X) X(half) X(float)
#include "types.h"
#include "traits.h"
#include "numbers.h"
#include "integers.h"
#include "mathematics.h"
#include "synchronization.h"
#include "lanes.h"
#include "matrices.h"
#include "atomics.h"
#include "apple.h"
#include "host.h"
