// The scans' inner loops for CPUs. Built on first use by native.py; a plain C interface, called through ctypes.
// One translation unit: every header is a room of its own, and all are compiled together.

#include "activations.h"
#include "chain.h"
#include "convolution.h"
#include "lti.h"
#include "mamba.h"
#include "selective.h"
#if defined(__AVX512F__)  // nobody calls them elsewhere: see whole_vectors
#include "batch_norm.h"
#include "narrow.h"
#endif

// Whether a short vector is one register here. Where compilers split it, narrow.h and batch_norm.h gain nothing.
extern "C" int whole_vectors() {
#if defined(__AVX512F__)
    return 1;
#else
    return 0;
#endif
}
