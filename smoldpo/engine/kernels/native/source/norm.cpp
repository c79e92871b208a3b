// Between products, a row (a token's features) at a time:
//   RMSNorm    y = w x r,  r = (mean(x²) + ε)^-1/2; rounded before w is applied, as transformers does
//              backward, n = x r:  dx = r (w dy - n mean(w dy n)),  dw = sum over rows of dy n
//   rotation   of halves x1, x2 of each head by its token's angles; backward by the opposite ones
#include "common.h"

INL __m512 get(const float* p) { return _mm512_loadu_ps(p); }
INL __m512 get(const bf* p) { return up(p); }
INL void set(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
INL void set(bf* p, __m512 v) { narrow(p, v); }
INL __m512 rounded(__m512 v) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v)), 16));
}

template <class In>
INL void forward(const In* x, const bf* w, bf* y, float* scale, long T, long D, float epsilon) {
  for (long t = 0; t < T; t++, x += D, y += D) {
    __m512 a = _mm512_setzero_ps(), b = a;
    for (long i = 0; i < D; i += 32) {
      __m512 p = get(x + i), q = get(x + i + 16);
      a = _mm512_fmadd_ps(p, p, a);
      b = _mm512_fmadd_ps(q, q, b);
    }
    scale[t] = 1.f / sqrtf(_mm512_reduce_add_ps(_mm512_add_ps(a, b)) / D + epsilon);
    const __m512 r = _mm512_set1_ps(scale[t]);
    for (long i = 0; i < D; i += 16)
      narrow(y + i, _mm512_mul_ps(rounded(_mm512_mul_ps(get(x + i), r)), up(w + i)));
  }
}
template <class In>
INL void backward(const In* x, const bf* w, const float* scale, const bf* dy, In* dx, float* dw,
                  long T, long D) {
  for (long t = 0; t < T; t++, x += D, dy += D, dx += D) {
    const __m512 r = _mm512_set1_ps(scale[t]);
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < D; i += 16) {
      __m512 both = _mm512_mul_ps(up(dy + i), _mm512_mul_ps(get(x + i), r));
      if (dw) _mm512_storeu_ps(dw + i, _mm512_add_ps(_mm512_loadu_ps(dw + i), both));
      sum = _mm512_fmadd_ps(both, up(w + i), sum);
    }
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / D);
    for (long i = 0; i < D; i += 16) {
      __m512 unit = _mm512_mul_ps(get(x + i), r), g = _mm512_mul_ps(up(dy + i), up(w + i));
      set(dx + i, _mm512_mul_ps(_mm512_fnmadd_ps(unit, mean, g), r));
    }
  }
}

// x [T][D] float32 (or bfloat16, `narrow_x`), D a multiple of 32; w [D], y [T][D]; scale [T] is r
EXPORT int norm_forward(const void* x, const bf* w, bf* y, float* scale, long narrow_x, long T,
                        long D, float epsilon) {
  if (narrow_x) forward((const bf*)x, w, y, scale, T, D, epsilon);
  else forward((const float*)x, w, y, scale, T, D, epsilon);
  return 0;
}
// dx as x; dw [D], added to, or null
EXPORT int norm_backward(const void* x, const bf* w, const float* scale, const bf* dy, void* dx,
                         float* dw, long narrow_x, long T, long D) {
  if (narrow_x) backward((const bf*)x, w, scale, dy, (bf*)dx, dw, T, D);
  else backward((const float*)x, w, scale, dy, (float*)dx, dw, T, D);
  return 0;
}

// x, y [T][H][d], d a multiple of 32; cos, sin [T][d] float32; direction 1 or -1
EXPORT int rotate(const bf* x, const float* cos, const float* sin, bf* y, long T, long H, long d,
                  float direction) {
  const __m512 sign = _mm512_set1_ps(direction);
  for (long t = 0; t < T; t++)
    for (long h = 0; h < H; h++) {
      const bf* from = x + (t * H + h) * d;
      bf* to = y + (t * H + h) * d;
      for (long i = 0; i < d / 2; i += 16) {
        __m512 a = up(from + i), b = up(from + d / 2 + i), c = _mm512_loadu_ps(cos + t * d + i);
        __m512 s = _mm512_mul_ps(sign, _mm512_loadu_ps(sin + t * d + i));
        narrow(to + i, _mm512_fnmadd_ps(b, s, _mm512_mul_ps(a, c)));
        narrow(to + d / 2 + i, _mm512_fmadd_ps(a, s, _mm512_mul_ps(b, c)));
      }
    }
  return 0;
}
