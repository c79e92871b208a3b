// The LM head on rows that predict: log p(y) and the direction W_y - pᵀW of its gradient, without
// logits in memory. Some hundred words at a time, whose rows of W are laid into tiles as they are
// (for the logits) and transposed (for pᵀW), 32 rows of states against them.
//
// All is relative to the target's logit: with e = exp(l - l_y), log p(y) = -log sum e, and nothing is
// rescaled when a larger logit comes. Where l - l_y goes beyond 80, e would overflow: such a row's
// log p is above -80 no more, and the caller computes it by other means.
#include "common.h"

// x [n][D] in tiles, transposed [D/16][n/32][16][32] (unless null) and as it is [n/16][D/32][16][32]
INL void tiles_of(const bf* x, long n, long D, bf* transposed, bf* same) {
  for (long t = 0; t < n; t += 16)
    for (long f = 0; f < D; f += 32)
      for (int i = 0; i < 16; i++)
        _mm512_storeu_si512(same + (t / 16 * (D / 32) + f / 32) * 512 + i * 32,
                            _mm512_loadu_si512(x + (t + i) * D + f));
  if (transposed) transposed_tiles(x, D, n, D, transposed);
}

// h [N][D], w [V][D], target [N]: N and D multiples of 32. logp, logit (the target's) [N];
// direction [N][D], or null.
EXPORT int head_forward(const bf* h, const bf* w, const int64_t* target, float* logp, float* logit,
                        bf* direction, long N, long D, long V) {
  KERNEL(
    const long words = std::min(512l, std::max(64l, 300000 / D / 32 * 32)); const long panels = N / 32;
    bf* hp = s.get<bf>(N * D); bf* wa = s.get<bf>(words * D); bf* pp = s.get<bf>(words * 32);
    bf* wt = direction ? s.get<bf>(words * D) : nullptr;
    float* acc = direction ? s.get<float>(N * D) : nullptr; float* sum = s.get<float>(N);
    alignas(64) float c[1024];
    pack_features(h, D, N, D, hp);
    for (long t = 0; t < N; t++) {
      __m512 a = _mm512_setzero_ps();
      const bf* y = w + target[t] * D;
      for (long i = 0; i < D; i += 16) a = _mm512_fmadd_ps(up(h + t * D + i), up(y + i), a);
      logit[t] = _mm512_reduce_add_ps(a);
      sum[t] = 0;
    }
    for (long v0 = 0; v0 < V; v0 += words) {
      const long real = std::min(words, V - v0); const long n = (real + 31) / 32 * 32;
      const bf* part = w + v0 * D;
      if (n > real) {  // the last words, with zeros behind them
        bf* filled = s.get<bf>(n * D);
        memcpy(filled, part, real * D * 2);
        memset(filled + real * D, 0, (n - real) * D * 2);
        part = filled;
      }
      tiles_of(part, n, D, wt, wa);
      for (long p = 0; p < panels; p++) {
        __m512 ref[2]; __m512 total[2];
        for (int u = 0; u < 2; u++) {
          ref[u] = _mm512_loadu_ps(logit + p * 32 + 16 * u);
          total[u] = _mm512_setzero_ps();
        }
        for (long b = 0; b < n; b += 32) {
          blk<false, true>(wa + b * D, wa + (b + 16) * D, 32, 512, hp + p * D * 32, 1024, D / 32, c,
                           32, false);
          for (int i = 0; i < 32; i += 2)
            for (int u = 0; u < 2; u++) {
              const float* at = c + i * 32 + 16 * u;
              __m512 e0 = exp512(_mm512_sub_ps(_mm512_load_ps(at), ref[u]));
              __m512 e1 = exp512(_mm512_sub_ps(_mm512_load_ps(at + 32), ref[u]));
              if (b + i >= real) e0 = _mm512_setzero_ps();
              if (b + i + 1 >= real) e1 = _mm512_setzero_ps();
              total[u] = _mm512_add_ps(total[u], _mm512_add_ps(e0, e1));
              if (direction)
                _mm512_storeu_si512(pp + b * 32 + u * 512 + i / 2 * 32, paired(e0, e1));
            }
        }
        for (int u = 0; u < 2; u++) {
          float* to = sum + p * 32 + 16 * u;
          _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), total[u]));
        }
        for (long f = 0; direction && f < D; f += 32)
          blk<false, true>(wt + f * n, wt + (f + 16) * n, 32, 512, pp, 1024, n / 32,
                           acc + p * D * 32 + f * 32, 32, v0 > 0);
      }
    }
    for (long t = 0; t < N; t++) logp[t] = -logf(sum[t]);
    for (long p = 0; direction && p < panels; p++) {
      for (int u = 0; u < 2; u++) {
        __m512 share = _mm512_div_ps(_mm512_set1_ps(1.f), _mm512_loadu_ps(sum + p * 32 + 16 * u));
        for (long f = 0; f < D; f++) {
          float* at = acc + (p * D + f) * 32 + 16 * u;
          _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), share));
        }
      }
      for (long f = 0; f < D; f += 32) {
        for (int u = 0; u < 2; u++) {  // W_y - mean, rounded once
          __m512i low[16]; __m512i high[16];
          columns(acc + p * D * 32 + f * 32, u, low, high);
          for (int i = 0; i < 16; i++) {
            long row = p * 32 + 16 * u + i;
            const bf* y = w + target[row] * D + f;
            __m512 a = _mm512_sub_ps(up(y), _mm512_castsi512_ps(low[i]));
            __m512 b = _mm512_sub_ps(up(y + 16), _mm512_castsi512_ps(high[i]));
            _mm512_storeu_si512(direction + row * D + f, narrow2(a, b));
          }
        }
      }
    })
}
