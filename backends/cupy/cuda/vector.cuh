// VEC adjacent values that are read or written at once; 1 if not defined. The host uses more only
// if the batch size is a multiple of VEC and every array is aligned: then all of them have the same
// position in the image.
#pragma once
#ifndef VEC
#define VEC 1
#endif

template <typename T>
struct __align__(VEC * sizeof(T)) Several { T value[VEC]; };
typedef Several<REAL> Vector;

__device__ __forceinline__ Vector read(const REAL* from) {
  return *reinterpret_cast<const Vector*>(from);
}
