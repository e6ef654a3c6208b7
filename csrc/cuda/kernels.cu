// All device code, in one file for one fatbin.
#include "adam.cuh"
#include "topk.cuh"
