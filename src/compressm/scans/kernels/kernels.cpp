// The scans' inner loops for CPUs. Built on first use by native.py; a plain C interface, called through ctypes.
// One translation unit: every header is a room of its own, and all are compiled together.

#include "activations.h"
#include "batch_norm.h"
#include "chain.h"
#include "convolution.h"
#include "delta.h"
#include "gla.h"
#include "lti.h"
#include "mamba.h"
#include "narrow.h"
#include "products.h"
#include "selective.h"
#include "ssd.h"

extern "C" int vector_size() { return vector_bytes; }
