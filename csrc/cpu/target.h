// Compiling a part of a file for an instruction set that the rest does not assume.
#pragma once

#if defined(__GNUC__) && defined(__x86_64__)
#define DUALEDIT_X86 1
#include <immintrin.h>
#endif

#ifdef __clang__
#define DUALEDIT_PRAGMA(text) _Pragma(#text)
#define DUALEDIT_TARGET(features) \
  DUALEDIT_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define DUALEDIT_TARGET_END _Pragma("clang attribute pop")
#else
#define DUALEDIT_PRAGMA(text) _Pragma(#text)
#define DUALEDIT_TARGET(features) _Pragma("GCC push_options") DUALEDIT_PRAGMA(GCC target(features))
#define DUALEDIT_TARGET_END _Pragma("GCC pop_options")
#endif
