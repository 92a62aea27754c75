// The scans with matrix-valued states, and the norm after them: a unit of its own, so that who does not use them does not wait for their compilation.

#include "delta.h"
#include "gated_norm.h"
#include "gla.h"
#include "ssd.h"

extern "C" int vector_size() { return vector_bytes; }
