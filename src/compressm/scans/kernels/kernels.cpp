// The inner loops of the scans with vector-valued states, and of what surrounds them, for CPUs. Built on first use by
// native.py; a plain C interface, called through ctypes. Every header is a room of its own.

#include "activations.h"
#include "batch_norm.h"
#include "chain.h"
#include "convolution.h"
#include "impulse.h"
#include "lti.h"
#include "mamba.h"
#include "narrow.h"
#include "selective.h"

extern "C" int vector_size() { return vector_bytes; }
