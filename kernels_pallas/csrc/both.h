// BOTH: the qualifier of functions that are compiled for the CPU and for the GPU.

#pragma once

#ifdef __CUDACC__
#define BOTH __host__ __device__ __forceinline__
#else
#define BOTH inline
#endif
