// What runs on a CPU and on a GPU alike.

#pragma once

#ifdef __CUDACC__
#define BOTH __host__ __device__ __forceinline__
#else
#define BOTH inline
#endif
