// The scans' inner loops for CPUs. Built on first use by native.py; a plain C interface, called through ctypes.
// One translation unit: every header is a room of its own, and all are compiled together.

#include "activations.h"
#include "batch_norm.h"
#include "chain.h"
#include "convolution.h"
#include "lti.h"
#include "mamba.h"
#include "narrow.h"
#include "selective.h"

// Whether a short vector is one register here. Where compilers split it, narrow.h and batch_norm.h gain nothing.
extern "C" int whole_vectors() {
#if defined(__AVX512F__)
    return 1;
#else
    return 0;
#endif
}
