// Which instruction-set variant of the kernels runs. Chosen once; PADKERN_ISA overrides.
#pragma once

namespace padkern {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

const char* isa_name(Isa isa);

// What the CPU and the operating system support.
Isa detected_isa();

// The variant in use. Returns false and a message when PADKERN_ISA names an unknown level or one
// that this CPU lacks.
bool chosen_isa(Isa* isa, const char** error);

}  // namespace padkern
