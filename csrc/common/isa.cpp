#include "common/isa.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace padkern {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

Isa detected_isa() {
#if defined(__x86_64__)
  // The builtins check the operating system's saved state too, not only the CPUID bit.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("fma")) {
    return Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

namespace {

struct Choice {
  Isa isa = Isa::kBaseline;
  bool ok = true;
  char error[160] = "";
};

Choice choose() {
  Choice choice;
  const Isa detected = detected_isa();
  choice.isa = detected;
  const char* wanted = std::getenv("PADKERN_ISA");
  if (wanted == nullptr || wanted[0] == '\0') return choice;
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (std::strcmp(wanted, isa_name(isa)) != 0) continue;
    if (static_cast<int>(isa) > static_cast<int>(detected)) {
      choice.ok = false;
      std::snprintf(choice.error, sizeof(choice.error),
                    "PADKERN_ISA=%s is not supported by this CPU, which has %s", wanted,
                    isa_name(detected));
    }
    choice.isa = isa;
    return choice;
  }
  choice.ok = false;
  std::snprintf(choice.error, sizeof(choice.error),
                "PADKERN_ISA must be baseline, avx2 or avx512, got '%.32s'", wanted);
  return choice;
}

}  // namespace

bool chosen_isa(Isa* isa, const char** error) {
  static const Choice choice = choose();
  *isa = choice.isa;
  *error = choice.error;
  return choice.ok;
}

}  // namespace padkern
