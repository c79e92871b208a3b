// Attention within each pair P C R of a stream: R does not see C, and what pairs share stands once,
// at the head of the stream.
//
// For one pair and head, queries 32 at a time (a panel) against blocks of 32 keys, blocks that no
// query of the panel sees left out. Scores are [keys][queries], so softmax's sums run over rows:
//   S = K qᵀ;   p = exp(scale S - max);   o = Vᵀ p / sum       a panel's scores lie in the cache whole
// backward, with L = max + log sum and delta = rowsum(dO o), for a part of the queries at a time
// (of all query heads of a key head together), so that memory grows with the keys alone:
//   P = exp(scale S - L);   dS = scale P (V dOᵀ - delta);   dq = Kᵀ dS
//   dV += P dO;   dK += dS q
// Keys and values that pairs share get gradients from every pair, summed in float32.
#include "common.h"

static const long kPart = 512;  // queries of a head at a time, backward

// A pair's rows in their order are the stream's tokens 0 .. shared and then start .. ; queries from
// row `first` on are computed.
struct Pair {
  long start, P, C, R, shared, first;
  long rows() const { return P + C + R; }
  long token(long row) const { return row < shared ? row : start + row - shared; }
  long chosen_end() const { return P + C; }
};
// Whether any query of panel j sees a key of block b, and whether some do not.
INL bool seen(const Pair& p, long j, long b) {
  if (b > j) return false;
  return !(j * 32 >= p.chosen_end() && b * 32 >= p.P && b * 32 + 32 <= p.chosen_end());
}
INL bool partly(const Pair& p, long j, long b) {
  bool chosen = b * 32 < p.chosen_end() && b * 32 + 32 > p.P;
  return b == j || (j * 32 + 32 > p.chosen_end() && chosen);
}
// Which of 16 queries from q0 see the key.
INL __mmask16 mask_of(const Pair& p, long key, long q0) {
  long off = key - q0;
  __mmask16 mask = off <= 0 ? 0xffff : off >= 16 ? 0 : (__mmask16)(0xffff << off);
  if (key >= p.P && key < p.chosen_end()) {
    long before = p.chosen_end() - q0;
    mask &= before <= 0 ? 0 : before >= 16 ? 0xffff : (__mmask16)((1 << before) - 1);
  }
  return mask;
}
// The pair's rows of one head, [pad][d], zeros behind them
INL void gather(const bf* x, long ld, const Pair& p, long d, long pad, bf* out) {
  long n = p.rows();
  for (long i = 0; i < n; i++)
    for (long f = 0; f < d; f += 32)
      _mm512_storeu_si512(out + i * d + f, _mm512_loadu_si512(x + p.token(i) * ld + f));
  memset(out + n * d, 0, (pad - n) * d * 2);
}
INL void scatter(const bf* rows, const Pair& p, long d, bf* out, long ld) {
  for (long i = std::max(p.shared, p.first / 32 * 32); i < p.rows(); i++)
    for (long f = 0; f < d; f += 32)
      _mm512_storeu_si512(out + p.token(i) * ld + f, _mm512_loadu_si512(rows + i * d + f));
}
// c [d/32 blocks of 32 x 32] = A (transposed keys or values, in tiles) times B (a panel of weights
// [keys][32 queries]), over the blocks of keys that panel j sees.
INL void over_keys(const Pair& p, long j, const bf* A, long panels, const bf* B, long d, float* c) {
  bool first = true;
  for (long b = 0; b <= j;) {
    if (!seen(p, j, b)) {
      b++;
      continue;
    }
    long e = b;
    while (e <= j && seen(p, j, e)) e++;
    for (long f = 0; f < d / 32; f++) {
      const bf* a = A + (2 * f * panels + b) * 512;
      blk<false>(a, a + panels * 512, 32, 512, B + b * 1024, 1024, e - b, c + f * 1024, 32, !first);
    }
    first = false;
    b = e;
  }
}

INL void forward(Scratch& s, const bf* q, const bf* k, const bf* v, bf* o, float* lse, const Pair& p,
                 long T, long H, long K, long d, float scale) {
  long n = p.rows(), panels = (n + 31) / 32, pad = panels * 32, G = H / K;
  bf *row = s.get<bf>(pad * d), *kr = s.get<bf>(pad * d), *vt = s.get<bf>(pad * d);
  bf *qp = s.get<bf>(pad * d), *pp = s.get<bf>(pad * 32), *out = s.get<bf>(pad * d);
  float *sc = s.get<float>(pad * 32), *c = s.get<float>(d * 32);
  const __m512 sv = _mm512_set1_ps(scale), never = _mm512_set1_ps(-INFINITY);
  for (long h = 0; h < H; h++) {
    if (h % G == 0) {
      gather(v + h / G * d, K * d, p, d, pad, row);
      transposed_tiles(row, d, pad, d, vt);
      gather(k + h / G * d, K * d, p, d, pad, kr);
    }
    gather(q + h * d, H * d, p, d, pad, row);
    pack_features(row, d, pad, d, qp);
    for (long j = p.first / 32; j < panels; j++) {
      __m512 top[2] = {never, never}, sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
      for (long b = 0; b <= j; b++) {
        if (!seen(p, j, b)) continue;
        float* cb = sc + b * 1024;
        const bf* a = kr + b * 32 * d;
        blk<false>(a, a + 16 * d, d, 32, qp + j * d * 32, 1024, d / 32, cb, 32, false);
        bool part = partly(p, j, b);
        for (int i = 0; i < 32; i++)
          for (int u = 0; u < 2; u++) {
            __m512 x = _mm512_loadu_ps(cb + i * 32 + 16 * u);
            if (part) {
              x = _mm512_mask_mov_ps(never, mask_of(p, b * 32 + i, j * 32 + 16 * u), x);
              _mm512_storeu_ps(cb + i * 32 + 16 * u, x);
            }
            top[u] = _mm512_max_ps(top[u], x);
          }
      }
      __m512 off[2] = {_mm512_mul_ps(top[0], sv), _mm512_mul_ps(top[1], sv)};
      for (long b = 0; b <= j; b++) {
        if (!seen(p, j, b)) continue;
        for (int i = 0; i < 32; i += 2)
          for (int u = 0; u < 2; u++) {
            const float* at = sc + b * 1024 + i * 32 + 16 * u;
            __m512 e0 = exp512(_mm512_fmsub_ps(_mm512_loadu_ps(at), sv, off[u]));
            __m512 e1 = exp512(_mm512_fmsub_ps(_mm512_loadu_ps(at + 32), sv, off[u]));
            sum[u] = _mm512_add_ps(sum[u], _mm512_add_ps(e0, e1));
            _mm512_storeu_si512(pp + b * 1024 + u * 512 + i / 2 * 32, paired(e0, e1));
          }
      }
      over_keys(p, j, vt, panels, pp, d, c);
      for (int u = 0; u < 2; u++) {
        const __m512 share = _mm512_div_ps(_mm512_set1_ps(1.f), sum[u]);
        for (long i = 0; i < d; i++) {
          float* at = c + i * 32 + 16 * u;
          _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), share));
        }
        float sums[16], tops[16];
        _mm512_storeu_ps(sums, sum[u]);
        _mm512_storeu_ps(tops, off[u]);
        for (int i = 0; i < 16; i++) {
          long at = j * 32 + 16 * u + i;
          if (at < n && at >= p.shared) lse[h * T + p.token(at)] = tops[i] + logf(sums[i]);
        }
      }
      for (long f = 0; f < d; f += 32) store_tokens(c + f * 32, out + j * 32 * d + f, d);
    }
    scatter(out, p, d, o + h * d, H * d);
  }
}

INL void backward(Scratch& s, const bf* q, const bf* k, const bf* v, const bf* o, const float* lse,
                  const bf* dO, bf* dq, bf* dk, bf* dv, float* common_k, float* common_v,
                  const Pair& p, long prefix, long T, long H, long K, long d, float scale) {
  long n = p.rows(), panels = (n + 31) / 32, pad = panels * 32, G = H / K;
  long first = p.first / 32, part = std::min(kPart / 32, panels - first);
  bf *row = s.get<bf>(pad * d), *kr = s.get<bf>(pad * d), *vr = s.get<bf>(pad * d);
  bf *kt = s.get<bf>(pad * d), *out = s.get<bf>(G * pad * d), *ds = s.get<bf>(pad * 32);
  bf *qp = s.get<bf>(G * pad * d), *dop = s.get<bf>(G * pad * d);
  bf *qt = s.get<bf>(G * pad * d), *dot = s.get<bf>(G * pad * d);
  bf *pA = s.get<bf>(pad * G * part * 32), *dsA = s.get<bf>(pad * G * part * 32);
  float *delta = s.get<float>(G * pad), *ls = s.get<float>(G * pad), *c = s.get<float>(d * 32);
  float *sum_k = s.get<float>(pad * d), *sum_v = s.get<float>(pad * d);
  alignas(64) float scores[1024], slopes[1024];
  const __m512 sv = _mm512_set1_ps(scale);
  for (long kv = 0; kv < K; kv++) {
    gather(k + kv * d, K * d, p, d, pad, kr);
    transposed_tiles(kr, d, pad, d, kt);
    gather(v + kv * d, K * d, p, d, pad, vr);
    for (long g = 0; g < G; g++) {
      long h = kv * G + g;
      gather(q + h * d, H * d, p, d, pad, row);
      pack_features(row, d, pad, d, qp + g * pad * d);
      pack_tokens(row, d, pad, d, qt + g * pad * d);
      gather(dO + h * d, H * d, p, d, pad, row);
      memset(row, 0, p.shared * d * 2);  // what is shared has a slot of its own
      pack_features(row, d, pad, d, dop + g * pad * d);
      pack_tokens(row, d, pad, d, dot + g * pad * d);
      for (long i = 0; i < pad; i++) {
        bool own = i >= p.shared && i >= first * 32 && i < n;
        delta[g * pad + i] = 0, ls[g * pad + i] = INFINITY;  // so that its weights are 0
        if (!own) continue;
        const bf* from = o + p.token(i) * H * d + h * d;
        __m512 a = _mm512_setzero_ps();
        for (long f = 0; f < d; f += 16) a = _mm512_fmadd_ps(up(from + f), up(row + i * d + f), a);
        delta[g * pad + i] = _mm512_reduce_add_ps(a);
        ls[g * pad + i] = lse[h * T + p.token(i)];
      }
    }
    for (long j0 = first; j0 < panels; j0 += part) {
      long end = std::min(panels, j0 + part);
      for (long g = 0; g < G; g++)
        for (long j = j0; j < end; j++) {
          __m512 de[2], le[2];
          for (int u = 0; u < 2; u++) {
            de[u] = _mm512_loadu_ps(delta + g * pad + j * 32 + 16 * u);
            le[u] = _mm512_loadu_ps(ls + g * pad + j * 32 + 16 * u);
          }
          for (long b = 0; b <= j; b++) {
            if (!seen(p, j, b)) continue;
            const bf *ka = kr + b * 32 * d, *va = vr + b * 32 * d;
            long at = g * pad * d + j * d * 32;
            blk<false>(ka, ka + 16 * d, d, 32, qp + at, 1024, d / 32, scores, 32, false);
            blk<false>(va, va + 16 * d, d, 32, dop + at, 1024, d / 32, slopes, 32, false);
            bool some = partly(p, j, b);
            // Tiles of 16 keys and 32 queries, those of a block of keys one behind another.
            long to = (2 * b * G * part + g * part + j - j0) * 512;
            for (int i = 0; i < 32; i += 2) {
              __m512 dr[2][2];
              for (int x = 0; x < 2; x++) {
                __m512 pr[2];
                for (int u = 0; u < 2; u++) {
                  long of = (i + x) * 32 + 16 * u;
                  __m512 e = exp512(_mm512_fmsub_ps(_mm512_load_ps(scores + of), sv, le[u]));
                  if (some) e = _mm512_maskz_mov_ps(mask_of(p, b * 32 + i + x, j * 32 + 16 * u), e);
                  pr[u] = e;
                  dr[x][u] = _mm512_mul_ps(_mm512_mul_ps(e, sv),
                                           _mm512_sub_ps(_mm512_load_ps(slopes + of), de[u]));
                }
                long line = to + (i / 16) * G * part * 512 + (i % 16 + x) * 32;
                _mm512_storeu_si512(pA + line, narrow2(pr[0], pr[1]));
                _mm512_storeu_si512(dsA + line, narrow2(dr[x][0], dr[x][1]));
              }
              for (int u = 0; u < 2; u++)
                _mm512_storeu_si512(ds + b * 1024 + u * 512 + i / 2 * 32, paired(dr[0][u], dr[1][u]));
            }
          }
          over_keys(p, j, kt, panels, ds, d, c);
          for (long f = 0; f < d; f += 32)
            store_tokens(c + f * 32, out + (g * pad + j * 32) * d + f, d);
        }
      for (long b = 0; b < panels; b++) {
        long from = std::max(b, j0), e = end;
        while (e > from && !seen(p, e - 1, b)) e--;
        bool begun = j0 > std::max(b, first);
        if (e <= from && begun) continue;
        for (int which = 0; which < 2; which++) {
          const bf* A = (which ? pA : dsA) + (2 * b * G * part + from - j0) * 512;
          const bf* B = (which ? dot : qt) + from * 1024;
          float* sum = (which ? sum_v : sum_k) + b * 32 * d;
          if (e <= from) memset(sum, 0, 32 * d * 4);
          for (long f = 0; f < d / 32 && e > from; f++)
            for (long g = 0; g < G; g++) {
              const bf *a = A + g * part * 512, *bt = B + g * pad * d + f * pad * 32;
              blk<false>(a, a + G * part * 512, 32, 512, bt, 1024, e - from, sum + f * 1024, 32,
                         begun || g > 0);
            }
        }
      }
    }
    for (long g = 0; g < G; g++)
      scatter(out + g * pad * d, p, d, dq + (kv * G + g) * d, H * d);
    for (long i = 0; i < n; i++)
      for (int which = 0; which < 2; which++) {
        long token = p.token(i), at = (token * K + kv) * d;
        const float* from = (which ? sum_v : sum_k) + i / 32 * 32 * d + i % 32 * 32;
        for (long f = 0; f < d; f += 32, at += 32) {
          __m512 low = _mm512_loadu_ps(from + f * 32), high = _mm512_loadu_ps(from + f * 32 + 16);
          if (token >= prefix) {
            _mm512_storeu_si512((which ? dv : dk) + at, narrow2(low, high));
            continue;
          }
          float* to = (which ? common_v : common_k) + at;
          _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), low));
          _mm512_storeu_ps(to + 16, _mm512_add_ps(_mm512_loadu_ps(to + 16), high));
        }
      }
  }
}

// q, o [T][H][d], k, v [T][K][d], d a multiple of 32; lse [H][T]; pairs [count][6] as Pair. o of rows
// that are not computed stays as it is.
EXPORT int attention_forward(const bf* q, const bf* k, const bf* v, bf* o, float* lse,
                             const int64_t* pairs, long count, long T, long H, long K, long d,
                             float scale) {
  KERNEL(
    const Scratch::Mark here = s.mark();
    for (long i = 0; i < count; i++, pairs += 6) {
      Pair p{pairs[0], pairs[1], pairs[2], pairs[3], pairs[4], pairs[5]};
      forward(s, q, k, v, o, lse, p, T, H, K, d, scale);
      s.back_to(here);
    })
}

// `prefix` tokens at the head of the stream are shared. Rows of no pair stay as they are in dq, dk
// and dv, and so do rows of dq that are not computed.
EXPORT int attention_backward(const bf* q, const bf* k, const bf* v, const bf* o, const float* lse,
                              const bf* dO, bf* dq, bf* dk, bf* dv, const int64_t* pairs, long count,
                              long prefix, long T, long H, long K, long d, float scale) {
  KERNEL(
    float* common_k = s.get<float>(prefix * K * d); float* common_v = s.get<float>(prefix * K * d);
    memset(common_k, 0, prefix * K * d * 4);
    memset(common_v, 0, prefix * K * d * 4);
    const Scratch::Mark here = s.mark();
    for (long i = 0; i < count; i++, pairs += 6) {
      Pair p{pairs[0], pairs[1], pairs[2], pairs[3], pairs[4], pairs[5]};
      backward(s, q, k, v, o, lse, dO, dq, dk, dv, common_k, common_v, p, prefix, T, H, K, d, scale);
      s.back_to(here);
    }
    for (long i = 0; i < prefix * K * d; i += 16) {
      narrow(dk + i, _mm512_loadu_ps(common_k + i));
      narrow(dv + i, _mm512_loadu_ps(common_v + i));
    })
}
