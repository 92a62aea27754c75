"""Pure functions on float64 tensors: no module, no hook, nothing is written."""
