// Which instruction sets this machine and this library have, and the names under which the kernels are compiled.
//
// Every file that says "compiled once per instruction set" is compiled with -DALBERT_ISA=<name> and that name's flags:
//   avx2         -mavx2 -mfma -mf16c
//   avx512       the same and -mavx512f -mavx512bw -mavx512dq -mavx512vl
//   avx512_vnni  the same and -mavx512vnni      (gemm_micro.cpp only)
//   avx512_bf16  the same and -mavx512bf16      (gemm_micro.cpp only)
// and puts everything, inline functions included, into namespace albert::<name>: the linker keeps one copy of an
// inline function, and it must never be one that the machine cannot run. For the same reason those files use no
// templates of the standard library.
//
// A library for a machine without AVX-512 leaves the objects of avx512* out: what others call of them is declared weak,
// null there, and detect_isa() then finds no AVX-512.
#pragma once
#include <cstdlib>
#include <cstring>

#include "gemm_micro.h"

namespace albert {

struct Isa {
  bool avx2 = false;    // AVX2 and FMA: the least that any kernel needs
  bool avx512 = false;  // F, BW, DQ, VL
  bool vnni = false;    // u8 x s8 dot products
  bool bf16 = false;    // bfloat16 dot products, where they are faster than float32
};

// bfloat16 dot products are off on Intel: from Sapphire Rapids on they do half as many operations a cycle as float32
// products (172 against 310 to 350 GFLOP/s on two cores), on AMD Zen 4 twice as many.
// ALBERT_FAST_ISA says otherwise, for tests: avx2, avx512_base (AVX-512 without VNNI and BF16), or avx512_bf16
// (everything that is there). An instruction set that the machine or the library lacks stays off.
inline Isa detect_isa() {
  Isa isa;
  isa.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  isa.avx512 = isa.avx2 && avx512::micro_kernel != nullptr && __builtin_cpu_supports("avx512f") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl");
  isa.vnni = isa.avx512 && __builtin_cpu_supports("avx512vnni");
  const char* wanted = std::getenv("ALBERT_FAST_ISA");
  const bool every = wanted != nullptr && std::strcmp(wanted, "avx512_bf16") == 0;
  isa.bf16 = isa.avx512 && __builtin_cpu_supports("avx512bf16") && (every || !__builtin_cpu_is("intel"));
  if (wanted != nullptr && std::strcmp(wanted, "avx2") == 0) isa.avx512 = isa.vnni = isa.bf16 = false;
  if (wanted != nullptr && std::strcmp(wanted, "avx512_base") == 0) isa.vnni = isa.bf16 = false;
  return isa;
}

}  // namespace albert
